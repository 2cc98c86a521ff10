"""The losses of ILQL, per response token. Pure.

Source: Snell et al. 2022 (arXiv 2206.11871), section 4; the defaults are those of trlx. A state s is the
text before a token, an action a the token, N the response tokens of a batch.
"""

import torch
from torch import Tensor

LOG_WEIGHT_LIMIT = 20.0  # one extreme token must not turn the loss of the batch into inf


def next_values(values: Tensor, is_last: Tensor) -> Tensor:
    """V of the state after each action, 0 after a response: values (N,) of the states before, row by row;
    is_last (N,) bool, the last token of each response -> (N,).
    """
    return torch.where(is_last, 0.0, values.roll(-1))


def td_loss(q: Tensor, rewards: Tensor, following: Tensor, gamma: float) -> Tensor:
    """(Q(s, a) - r - gamma V(s'))^2: the temporal-difference error of a Q head. The target has no gradient.

    q, rewards, following (N,): V(s') from `next_values` -> (N,), in squared units of the rewards. gamma: 0.99
    to 1; at 0.99 a reward 100 tokens away counts 0.37. Source: eq. 3, without the expectation over tokens.
    """
    return (q - (rewards + gamma * following.detach())).square()


def expectile_loss(values: Tensor, target_q: Tensor, tau: float) -> Tensor:
    """|tau - 1[u < 0]| u^2 with u = min target Q(s, a) - V(s): V becomes an expectile of Q over the data.

    values, target_q (N,) -> (N,). tau: 0.5 is the mean, towards 1 the largest Q in the data; 0.6 to 0.9.
    The target has no gradient. Source: eq. 4; Kostrikov et al. 2021 (IQL), eq. 5.
    """
    differences = target_q.detach() - values
    return torch.where(differences >= 0, tau, 1 - tau) * differences.square()


def cql_loss(q: Tensor, logsumexps: Tensor) -> Tensor:
    """log sum_a' exp Q(s, a') - Q(s, a): cross-entropy of the token under softmax(Q), which lowers the Q of
    tokens that are not in the data.

    q, logsumexps (N,) -> (N,), in nats. Source: section 4.3; Kumar et al. 2020 (CQL), eq. 4.
    """
    return logsumexps - q


def awac_loss(logprobs: Tensor, advantages: Tensor, beta: float) -> Tensor:
    """-exp(beta A) log pi(a | s): cross-entropy of the policy, weighted by the advantage min target Q - V.

    logprobs, advantages (N,) -> (N,), in nats. beta: 0, as in trlx, is plain fine-tuning; up to 1. The weight
    has no gradient, and is at most e^20. Source: Nair et al. 2020 (AWAC), eq. 13.
    """
    return -logprobs * (beta * advantages.detach()).clamp(max=LOG_WEIGHT_LIMIT).exp()

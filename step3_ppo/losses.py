"""The losses of PPO, per response token, (B, T) or any other shape, and how they are averaged. Pure."""

from collections.abc import Sequence
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # e^20: one extreme token must not turn the loss of the batch into inf


class PolicyLoss(NamedTuple):
    """Per token, each (B, T): loss, probability ratio, and where the clipped term was the active bound."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, dual_clip: float = 0.0,
    clip_range_high: float = 0.0, lengths: Sequence[int] = (),
) -> PolicyLoss:  # fmt: skip
    """Clipped surrogate, -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), for each token.

    logprobs, old_logprobs, advantages (B, T). low: clip_range; high: clip_range_high, or clip_range with 0.
    With `dual_clip` c > 1, the loss of a token with A < 0 is at most -c * A, which bounds the effect of huge
    ratios; 0 turns it off. lengths: of the responses, if all tokens of one have its ratio (GSPO); the rest
    is then (N,). Source: Schulman et al. 2017 (PPO), eq. 7; dual clip: Ye et al. 2020, eq. 5; two ranges
    (clip-higher): Yu et al. 2025 (DAPO), eq. 10.
    """
    log_ratio = logprobs - old_logprobs
    if lengths:
        log_ratio = response_log_ratio(log_ratio, lengths)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    unclipped = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + (clip_range_high or clip_range))
    loss = torch.maximum(unclipped, bounded)
    if dual_clip:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return PolicyLoss(loss, ratio.detach(), (bounded > unclipped).detach())


def response_log_ratio(log_ratio: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean over each response, with the gradient of the token: (N,) -> (N,), for responses of these lengths.

    Its exponential is the ratio of a response, pi(y) / pi_old(y), to the power of 1 / length. Source: Zheng
    et al. 2025 (GSPO), section 4.1; the gradient: GSPO-token, section 4.3, which is that of GSPO where all
    tokens of a response have the same advantage.
    """
    means = torch.cat([part.mean().expand(len(part)) for part in log_ratio.detach().split([*lengths])])
    return means + (log_ratio - log_ratio.detach())


def clipped_weight_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float
) -> PolicyLoss:
    """-w * A * log pi with the constant w = clip(ratio, 1 - low, 1 + high), for each token: (B, T).

    No token loses its gradient. low: clip_range, from 1 on without a lower bound; high: clip_range_high, or
    clip_range with 0. Source: MiniMax 2025 (MiniMax-M1: CISPO), section 3.1.
    """
    log_ratio = (logprobs - old_logprobs).detach()
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    weights = ratio.clamp(1.0 - clip_range, 1.0 + (clip_range_high or clip_range))
    return PolicyLoss(-weights * advantages * logprobs, ratio, weights != ratio)


def token_weights(response_lengths: Tensor, is_counted: Tensor, aggregation: str, longest: int) -> Tensor:
    """The weight of each response's tokens in a mean over all tokens: (B,), (B,) bool -> (B,).

    The mean of weight times loss over all tokens is, over the counted responses: with `token` the mean over
    tokens (Yu et al. 2025, DAPO, eq. 12), with `sequence` the mean over responses of the mean over their
    tokens (Shao et al. 2024, GRPO, eq. 3), with `constant` the mean over responses of the sum over their
    tokens, divided by `longest` (Liu et al. 2025, Dr. GRPO). All are 0 if no response counts.
    """
    tokens, counted = response_lengths.sum(), is_counted.sum().clamp(min=1)
    match aggregation:
        case "token":
            divisors = (response_lengths * is_counted).sum().clamp(min=1)
        case "sequence":
            divisors = counted * response_lengths
        case "constant":
            divisors = counted * longest
        case _:
            assert_never(aggregation)
    return is_counted * tokens / divisors


def rollout_weights(logprobs: Tensor, behaviour_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights of sampled tokens, min(pi / behaviour, cap), each (B, T); cap 0: 1.

    logprobs: of the trainer. behaviour_logprobs: with which the tokens were drawn. Source: Ionides 2008.
    """
    ratio = (logprobs - behaviour_logprobs).exp()
    return ratio.clamp(max=cap) if cap else torch.ones_like(ratio)


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, estimate: str) -> Tensor:
    """KL to the reference as a loss term, for each token: (B, T), (B, T) -> (B, T).

    With x = log pi - log pi_ref: `k2` is x^2 / 2; its expected gradient under the policy is that of the KL
    divergence. `k3` is exp(-x) - 1 + x; it is never negative and has less variance, but its expected gradient
    is that of the divergence the other way round, KL(pi_ref, pi). Below x = -20 it stays as it is there,
    without gradient. Source: Schulman, "Approximating KL divergence" (2020).
    """
    log_ratio = logprobs - ref_logprobs
    match estimate:
        case "k2":
            return 0.5 * log_ratio**2
        case "k3":
            # Both terms: the second one alone would pull such a token further away from the reference.
            limited = log_ratio.clamp(min=-LOG_RATIO_LIMIT)
            return torch.expm1(-limited) + limited
        case _:
            assert_never(estimate)


class ValueLoss(NamedTuple):
    """Per token, each (B, T): loss, and where the clipped term was the active bound."""

    loss: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> ValueLoss:
    """Clipped value loss, max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / 2, for each token.

    values, old_values, returns (B, T). Source: the PPO2 implementation of OpenAI baselines; Ziegler et al.
    2019.
    """
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)  # within the range, exactly V
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    return ValueLoss(0.5 * torch.maximum(error, clipped_error), (clipped_error > error).detach())

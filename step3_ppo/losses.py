"""The losses of PPO. Pure: everything is per response token, (B, T) or any other shape."""

from typing import NamedTuple, assert_never

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # e^20: keeps one absurd token from turning the whole batch into inf


class PolicyLoss(NamedTuple):
    """Per token, each (B, T): the loss, the probability ratio, and where the clip was the active bound."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float, dual_clip: float = 0.0
) -> PolicyLoss:
    """Clipped surrogate, -min(ratio * A, clip(ratio, 1 - e, 1 + e) * A), for each token.

    logprobs, old_logprobs, advantages (B, T). With `dual_clip` c > 1 the loss of a token with A < 0 is at
    most -c * A, so that a ratio that exploded cannot dominate (0 turns it off). Source: Schulman et al. 2017
    (PPO), eq. 7; dual clip: Ye et al. 2020, eq. 5.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(unclipped, bounded)
    if dual_clip:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return PolicyLoss(loss, ratio.detach(), (bounded > unclipped).detach())


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, estimate: str) -> Tensor:
    """KL from the reference as a term of the loss, for each token: (B, T), (B, T) -> (B, T).

    `k2`: half the squared log-ratio x = log pi - log pi_ref, whose gradient is that of the KL divergence in
    expectation over samples of the policy. `k3`: exp(-x) - 1 + x, never negative and of less variance, but
    with a gradient that is not KL's. Source: Schulman, "Approximating KL divergence" (2020).
    """
    log_ratio = logprobs - ref_logprobs
    match estimate:
        case "k2":
            return 0.5 * log_ratio**2
        case "k3":
            return torch.expm1(-log_ratio.clamp(min=-LOG_RATIO_LIMIT)) + log_ratio
        case _:
            assert_never(estimate)


class ValueLoss(NamedTuple):
    """Per-token results, each (B, T): the loss, and where the clip was the active bound."""

    loss: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> ValueLoss:
    """Half the larger of the squared errors of the value and of the value kept within `clip_range` of the old
    one.

    values, old_values, returns (B, T). Source: the PPO2 implementation of OpenAI baselines; Ziegler et al.
    2019.
    """
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    error, near_error = (values - returns) ** 2, (near - returns) ** 2
    return ValueLoss(0.5 * torch.maximum(error, near_error), (near_error > error).detach())

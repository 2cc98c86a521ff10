"""Advantage estimators: from rewards per token to advantages, with or without a critic. Pure."""

import torch
from torch import Tensor

from common.numeric.tensor_ops import masked_whiten

GROUP_EPS = 1e-4  # added to the standard deviation of a group, which may be 0


def generalised_advantages(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float,
    gae_lambda: float | Tensor, last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantage estimation over right-padded responses.

    rewards (B, T): per token; values (B, T): of the state before each token; response_mask (B, T): 1 on
    response tokens, which start at column 0; gae_lambda: one, or one per response (B,); last_values (B,): of
    the state after the last token. Without last_values that state is terminal, with value 0 (Pardo et al.
    2018: a time limit is not terminal).
    Returns advantages and returns (= advantages + values), both (B, T), 0 outside the mask. Source: Schulman
    et al. 2016 (GAE), eq. 16: A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.
    """
    mask = response_mask.to(values.dtype)
    rewards, values = rewards * mask, values * mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # (B, T)
    if last_values is not None:
        rows = torch.arange(len(values), device=values.device)
        next_values[rows, response_mask.sum(1) - 1] = last_values.to(values.dtype)
    deltas = (rewards + gamma * next_values - values) * mask
    advantages = discounted_sums(deltas, gamma * gae_lambda)
    return advantages * mask, (advantages + values) * mask


def length_adaptive_lambda(response_lengths: Tensor, alpha: float) -> Tensor:
    """Lambda of each response, 1 - 1 / (alpha * length), at least 0: (B,) -> (B,).

    sum_l lambda^l, the weight of all TD errors together, is alpha * length. Source: Yue et al. 2025 (VAPO),
    section 4.2.
    """
    return (1.0 - 1.0 / (alpha * response_lengths)).clamp(min=0.0)


def discounted_sums(rewards: Tensor, gamma: float | Tensor) -> Tensor:
    """Return at each token, sum_l gamma^l r_{t+l}: (B, T) -> (B, T). Padding must be 0.

    gamma: one, or one per response (B,).
    """
    sums = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * running
        sums[:, t] = running
    return sums


def reinforce_advantages(
    rewards: Tensor, response_mask: Tensor, gamma: float, baseline: Tensor | float
) -> Tensor:
    """Return at each token minus a baseline: rewards (B, T) -> (B, T).

    Source: Williams 1992 (REINFORCE).
    """
    return (discounted_sums(rewards * response_mask, gamma) - baseline) * response_mask


def whitened_returns(rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """Return at each token, whitened over all tokens of the rollout: (B, T) -> (B, T).

    Source: Hu 2025 (REINFORCE++), section 3.
    """
    return masked_whiten(discounted_sums(rewards * response_mask, gamma), response_mask)


def leave_one_out_advantages(totals: Tensor, group_size: int) -> Tensor:
    """Total reward of each response minus the mean of the other responses to its prompt: (B,) -> (B,).

    Responses to one prompt are adjacent. Source: Ahmadian et al. 2024 (RLOO), eq. 10; Kool et al. 2019.
    """
    groups = _groups(totals, group_size)  # (prompts, K)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten().to(totals.dtype)


def group_advantages(totals: Tensor, group_size: int, scale: bool) -> Tensor:
    """Total reward of each response minus the mean over its prompt's responses, divided by their standard
    deviation (with K - 1) plus 1e-4 with `scale`: (B,) -> (B,).

    Source: Shao et al. 2024 (GRPO), section 4.1.2; without scale: Liu et al. 2025 (Dr. GRPO), eq. 3.
    """
    groups = _groups(totals, group_size)  # (prompts, K)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + GROUP_EPS)
    return advantages.flatten().to(totals.dtype)


def _groups(totals: Tensor, group_size: int) -> Tensor:
    """(B,) -> (prompts, K), in double, in which the mean of equal rewards is exact, and advantages are 0."""
    return totals.double().view(-1, group_size)

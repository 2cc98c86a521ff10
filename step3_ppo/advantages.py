"""From rewards per token to advantages and returns. Pure."""

import torch
from torch import Tensor


def generalised_advantages(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over right-padded responses.

    rewards (B, T): per token; values (B, T): the critic before the token is chosen; response_mask (B, T): 1
    on response tokens, which start at column 0. The state after the last token is terminal, with value 0.
    Returns advantages and returns (= advantages + values), both (B, T), 0 outside the mask. Source: Schulman
    et al. 2016 (GAE), eq. 16: A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.
    """
    mask = response_mask.to(values.dtype)
    rewards, values = rewards * mask, values * mask
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # (B, T)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        running = deltas[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    return advantages * mask, (advantages + values) * mask

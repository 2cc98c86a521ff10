"""The Lagrangian of a limit on the mean cost: combined advantages, and the multiplier. Pure.

max E[score]  subject to  E[cost] <= limit: Dai et al. 2023 (Safe RLHF, arXiv 2310.12773), eq. 8 and 10, with
`limit` for -d.
"""

import math

from torch import Tensor


def combined_advantages(rewards: Tensor, costs: Tensor, multiplier: float) -> Tensor:
    """(A_r - lambda A_c) / (1 + lambda), from advantages of rewards and of costs, (B, T) each -> (B, T).

    The divisor keeps the size of updates the same for any lambda. Source: Dai et al. 2023, eq. 30, with one
    clipped loss of the combined advantage in place of two.
    """
    return (rewards - multiplier * costs) / (1.0 + multiplier)


def next_multiplier(
    multiplier: float, mean_cost: float, limit: float, learning_rate: float, lowest: float, highest: float
) -> float:
    """Gradient ascent on log lambda: ln lambda += learning_rate * lambda * (mean_cost - limit), in bounds.

    mean_cost: of a rollout's responses. It grows while the cost is above its limit, shrinks below, and stays
    if the cost is not a finite number. Source: Dai et al. 2023, eq. 31.
    """
    if not math.isfinite(mean_cost):
        return multiplier
    change = learning_rate * multiplier * (mean_cost - limit)
    raised = math.log(multiplier) + change
    return math.exp(min(max(raised, math.log(lowest)), math.log(highest)))

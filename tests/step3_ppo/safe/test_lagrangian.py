"""Combined advantages, the multiplier and costs per token, against closed forms."""

import math

import pytest
import torch

from step3_ppo.returns import shape_rewards
from step3_ppo.safe.costs import shape_costs
from step3_ppo.safe.lagrangian import combined_advantages, next_multiplier
from step3_ppo.safe.options import SafeOptions
from tests.conftest import assert_close
from tests.step3_ppo.test_returns import PLAIN, rollout, state

BOUNDS = {"lowest": 0.01, "highest": 5.0}
A_R, A_C = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[2.0, 4.0], [-1.0, 0.0]])


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [(0.0, A_R), (1.0, [[-0.5, -3.0], [0.75, 1.5]]), (3.0, [[-1.25, -3.5], [0.875, 0.75]])],
)
def test_advantages_are_weighted_by_the_multiplier(multiplier, expected):
    assert_close(combined_advantages(A_R, A_C, multiplier), torch.as_tensor(expected))


def test_the_multiplier_follows_the_gradient_of_its_logarithm():
    """d (lambda J) / d ln lambda = lambda J, by a numerical derivative of the Lagrangian."""
    multiplier, rate, mean_cost, limit = 0.7, 0.3, 0.9, 0.4

    def lagrangian(log_multiplier: float) -> float:
        return math.exp(log_multiplier) * (mean_cost - limit)

    log, h = math.log(multiplier), 1e-6
    gradient = (lagrangian(log + h) - lagrangian(log - h)) / (2 * h)
    expected = math.exp(log + rate * gradient)
    assert next_multiplier(multiplier, mean_cost, limit, rate, **BOUNDS) == pytest.approx(expected, rel=1e-8)


def test_the_multiplier_stays_in_its_bounds_and_at_the_limit():
    assert next_multiplier(1.0, 0.4, 0.4, 0.5, **BOUNDS) == pytest.approx(1.0)
    assert next_multiplier(1.0, 99.0, 0.0, 0.5, **BOUNDS) == pytest.approx(5.0)
    assert next_multiplier(1.0, -99.0, 0.0, 0.5, **BOUNDS) == pytest.approx(0.01)
    assert next_multiplier(1.0, math.nan, 0.0, 0.5, **BOUNDS) == 1.0
    assert next_multiplier(1.0, 9.0, 0.0, 0.0, **BOUNDS) == 1.0


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 4.0])
def test_the_kl_penalty_does_not_depend_on_the_multiplier(multiplier):
    """Summed over a response: (score - lambda cost) / (1 + lambda) - kl_coef * KL."""
    scored, costs, options = rollout([3.0, -7.0]), rollout([1.0, 2.0]), SafeOptions(**PLAIN)
    rewards, _ = shape_rewards(scored, options, state(0.5))
    combined = combined_advantages(rewards, shape_costs(costs, options, state(0.5)), multiplier)
    kl = torch.tensor([0.5 - 1.0 + 0.5 + 0.0, 0.5 + 1.0])
    expected = (scored.scores - multiplier * costs.scores) / (1 + multiplier) - 0.5 * kl
    assert_close(combined.sum(1), expected)


def test_a_penalty_in_the_loss_is_not_in_the_costs_and_costs_are_clipped_as_scores():
    options = SafeOptions(**PLAIN | {"score_clip": 5.0})
    costs = shape_costs(rollout([3.0, 7.0]), options, state(0.5, "k2"))
    assert_close(costs, torch.tensor([[0, 0, 0, 3.0], [0, 5.0, 0, 0]]))

"""Combined advantages, the multiplier and costs per token, against closed forms."""

import math

import pytest
import torch

from step3_ppo.returns import shape_rewards
from step3_ppo.safe.costs import token_costs
from step3_ppo.safe.lagrangian import combined_advantages, next_multiplier
from step3_ppo.safe.options import SafeOptions
from tests.conftest import assert_close
from tests.step3_ppo.test_returns import PLAIN, SCORER, rollout, state

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
def test_the_sum_over_a_response_is_that_of_ppo_with_a_fixed_penalty(multiplier):
    """score - lambda cost - kl_coef * KL, over 1 + lambda."""
    scored, costs, options = rollout([3.0, -7.0]), rollout([1.0, 2.0]), SafeOptions(**PLAIN)
    rewards, _ = shape_rewards(scored, SCORER, options, state(0.5))
    combined = combined_advantages(rewards, token_costs(costs, options), multiplier)
    penalised = rollout([3.0 - multiplier, -7.0 - 2 * multiplier])
    expected, _ = shape_rewards(penalised, SCORER, options, state(0.5))
    assert_close(combined * (1 + multiplier), expected)


def test_costs_are_at_the_last_token_and_clipped_as_scores():
    options = SafeOptions(**PLAIN | {"score_clip": 5.0})
    costs = token_costs(rollout([3.0, 7.0]), options)
    assert_close(costs, torch.tensor([[0, 0, 0, 3.0], [0, 5.0, 0, 0]]))

"""The pairwise loss and its gradients, against a reference implementation and closed forms."""

import math

import pytest
import torch

from step2_reward.loss import centring_loss, harm_loss, pairwise_loss
from tests.conftest import assert_close


@pytest.mark.parametrize("name", ["reward.bt.plain", "reward.bt.margin"])
def test_loss_and_gradients_match_the_reference(reference, name):
    case = reference(name)
    chosen = case.inputs.rewards_chosen.requires_grad_()
    rejected = case.inputs.rewards_rejected.requires_grad_()
    loss = pairwise_loss(chosen, rejected, getattr(case.inputs, "margin", 0.0)).mean()
    loss.backward()
    assert_close(loss, case.outputs.loss)
    assert_close(chosen.grad, case.outputs.grad_chosen)
    assert_close(rejected.grad, case.outputs.grad_rejected)


def test_equal_scores_cost_log_two_and_a_margin_shifts_it():
    score = torch.tensor([1.0, -2.0])
    assert_close(pairwise_loss(score, score), torch.full((2,), math.log(2.0)))
    assert_close(pairwise_loss(score + 0.5, score, torch.tensor(0.5)), torch.full((2,), math.log(2.0)))


def test_extreme_differences_are_finite_and_bf16_is_computed_in_fp32():
    chosen, rejected = torch.tensor([500.0, -500.0]), torch.tensor([-500.0, 500.0])
    assert_close(pairwise_loss(chosen, rejected), torch.tensor([0.0, 1000.0]))
    assert pairwise_loss(chosen.bfloat16(), rejected.bfloat16()).dtype == torch.float32


def test_centring_matches_the_reference(reference):
    case = reference("reward.bt.center")
    chosen = case.inputs.rewards_chosen.requires_grad_()
    rejected = case.inputs.rewards_rejected.requires_grad_()
    penalty = case.params.center_rewards_coefficient * centring_loss(chosen, rejected)
    loss = (pairwise_loss(chosen, rejected) + penalty).mean()
    loss.backward()
    assert_close(loss, case.outputs.loss)
    assert_close(chosen.grad, case.outputs.grad_chosen)
    assert_close(rejected.grad, case.outputs.grad_rejected)


@pytest.mark.parametrize("target", [0.5, 0.8, 1.0])
def test_the_loss_is_minimal_where_the_win_rate_equals_the_target(target):
    """Cross-entropy with a win probability: the minimum, its entropy, is at d = log(t / (1 - t)) + margin."""
    best = math.log(target / (1 - target)) if target < 1 else 30.0
    scores = torch.tensor([best + 0.3, best + 0.3 + 0.1, best + 0.3 - 0.1])
    at, above, below = pairwise_loss(scores, torch.zeros(3), 0.3, target).tolist()
    entropy = -target * math.log(target) - (1 - target) * math.log(1 - target) if target < 1 else 0.0
    assert at == pytest.approx(entropy, abs=1e-6)
    if target < 1:
        assert above > at + 1e-4 and below > at + 1e-4


def test_the_loss_of_a_tie_is_symmetric():
    a, b = torch.tensor([2.0]), torch.tensor([-1.0])
    assert_close(pairwise_loss(a, b, target=0.5), pairwise_loss(b, a, target=0.5))


def test_harm_loss_is_small_on_the_right_side_of_zero():
    """ln(1 + exp(-s C)): costs of 1 and -3, right and wrong, and ln 2 at the border."""
    costs, signs = torch.tensor([1.0, -3.0, 1.0, -3.0, 0.0]), torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    expected = [math.log(1 + math.exp(x)) for x in (-1, -3, 1, 3)] + [math.log(2)]
    assert_close(harm_loss(costs, signs), torch.tensor(expected))
    assert harm_loss(costs.bfloat16(), signs).dtype == torch.float32

"""The pairwise loss and its gradients, against another implementation and closed forms."""

import math

import pytest
import torch

from step2_reward.loss import pairwise_loss
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


def test_a_tie_costs_log_two_and_a_margin_moves_it():
    score = torch.tensor([1.0, -2.0])
    assert_close(pairwise_loss(score, score), torch.full((2,), math.log(2.0)))
    assert_close(pairwise_loss(score + 0.5, score, torch.tensor(0.5)), torch.full((2,), math.log(2.0)))


def test_extreme_differences_stay_finite_and_16_bits_are_computed_in_fp32():
    chosen, rejected = torch.tensor([500.0, -500.0]), torch.tensor([-500.0, 500.0])
    assert_close(pairwise_loss(chosen, rejected), torch.tensor([0.0, 1000.0]))
    assert pairwise_loss(chosen.bfloat16(), rejected.bfloat16()).dtype == torch.float32

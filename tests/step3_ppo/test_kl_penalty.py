"""The KL penalty: where it acts, and its adaptive coefficient, by hand."""

import pytest
import torch

from step3_ppo.kl_penalty import KLPenalty
from tests.conftest import assert_close


@pytest.mark.parametrize(
    "kl, expected",
    [
        (6.6, 0.1 * (1 + 0.1 * 0.05)),  # 10 % above the target
        (5.4, 0.1 * (1 - 0.1 * 0.05)),
        (6.0, 0.1),
        (60.0, 0.1 * (1 + 0.2 * 0.05)),  # the error counts 0.2 at most
        (-60.0, 0.1 * (1 - 0.2 * 0.05)),
    ],
)
def test_adaptive_controller_by_hand(kl, expected):
    controller = KLPenalty(coef=0.1, target=6.0, horizon=1000)
    controller.update(kl, num_responses=50)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_adaptive_controller_compounds():
    controller = KLPenalty(coef=0.1, target=6.0, horizon=100)
    for _ in range(3):
        controller.update(60.0, num_responses=10)
    assert controller.coef == pytest.approx(0.1 * 1.02**3, rel=1e-12)


def test_fixed_controller_stays():
    controller = KLPenalty(coef=0.1)
    controller.update(1e6, num_responses=50)
    assert controller.coef == 0.1


def test_the_penalty_is_in_the_reward_or_in_the_loss():
    loss, logprobs, ref_logprobs = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [-2.0, -1.0]])
    in_reward, in_loss = KLPenalty(0.5, "reward"), KLPenalty(0.5, "k2")
    assert (in_reward.reward_coef, in_loss.reward_coef) == (0.5, 0.0)
    assert in_reward.add_to_loss(loss, logprobs, ref_logprobs) is loss
    assert_close(in_loss.add_to_loss(loss, logprobs, ref_logprobs), torch.tensor([1.25, 2.25]))

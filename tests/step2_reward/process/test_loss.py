"""The loss of labelled steps, against torch and by hand."""

import math

import torch

from step2_reward.process.loss import step_loss
from tests.conftest import assert_close


def test_loss_is_the_cross_entropy_of_the_label() -> None:
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 5
    labels = torch.rand(50, generator=torch.Generator().manual_seed(1))
    labels[:20] = (labels[:20] > 0.5).float()
    expected = torch.nn.BCEWithLogitsLoss(reduction="none")(scores, labels)
    assert_close(step_loss(scores, labels), expected)


def test_loss_by_hand() -> None:
    """A right step of probability 3/4, a wrong one of 3/4, an unknown one."""
    scores = torch.tensor([math.log(3), math.log(3), 0.0])
    losses = step_loss(scores, torch.tensor([1.0, 0.0, 0.5]))
    assert_close(losses, torch.tensor([math.log(4 / 3), math.log(4), math.log(2)]))


def test_loss_of_16_bit_scores_is_in_fp32_and_finite() -> None:
    losses = step_loss(torch.tensor([-300.0, 300.0], dtype=torch.bfloat16), torch.tensor([1.0, 0.0]))
    assert losses.dtype == torch.float32 and losses.tolist() == [300.0, 300.0]

"""Sums of a micro-batch by hand, with a model whose scores are given."""

import math

import pytest
import torch

from step2_reward.process import objective
from step2_reward.process.data import LabelledSteps, collate

# Four records, labels and scores of their steps; the comment is whether the first wrong step is found.
LABELS = [[1.0, 0.0, 0.0], [1.0, 1.0], [0.0], [1.0, 0.0, 1.0]]
SCORES = [[2.0, -1.0, 3.0], [1.0, -0.5], [-4.0], [-1.0, -1.0, -1.0]]  # yes, no, yes, no


def test_sums_and_figures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [LabelledSteps([7] * 4, [*range(len(labels))], labels) for labels in LABELS]
    scores = torch.tensor(sum(SCORES, [])).requires_grad_()
    monkeypatch.setattr(objective, "token_scores", lambda *_: scores)
    losses, sums = objective.step_losses(None, collate(rows, 0))
    expected = [
        math.log1p(math.exp(-score if label else score))
        for labels, row in zip(LABELS, SCORES, strict=True)
        for label, score in zip(labels, row, strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected) and losses.requires_grad
    assert sums.tolist() == pytest.approx([sum(expected), 5, 5, 9, 2, 4])
    means = {name: mean.value for name, mean in objective.figures(*sums.tolist()).items()}
    assert means == pytest.approx(
        {"loss": sum(expected) / 9, "accuracy": 5 / 9, "first_error": 2 / 4, "right_share": 5 / 9}
    )

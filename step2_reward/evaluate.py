"""What a reward model says of held-out pairs, and the average that its scores are centred on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.data import deal, pad_rows
from common.distributed import device, rank, sum_over_ranks
from common.models import last_positions, token_scores
from common.options import world_size
from step2_reward.data import Batch, Preference, collate
from step2_reward.loss import pairwise_loss


def pair_scores(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores of the B chosen and the B rejected responses, each (B,), in one forward pass."""
    scores = token_scores(model, batch.input_ids, last_positions(batch.lengths, batch.input_ids.shape[1]))
    chosen, rejected = scores.chunk(2)
    return chosen, rejected


@torch.no_grad()
def evaluate(
    engine: Any, rows: Sequence[Preference], micro_batch: int, pad_token_id: int
) -> dict[str, float]:
    """Loss, accuracy, mean margin, and mean and std of the scores of either side.

    Accuracy is over the pairs of which one is better; equal scores are half right there.
    """
    engine.eval()
    sums = torch.zeros(9, dtype=torch.float64)
    for picked in deal(range(len(rows)), [row.length for row in rows], micro_batch, rank(), world_size()):
        # A rank without rows in the last round still takes part in it: at ZeRO-3 a forward needs every rank.
        batch = collate([rows[i] for i in picked] or rows[:1], pad_token_id)
        chosen, rejected = pair_scores(engine, batch)
        if picked:
            right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
            loss = pairwise_loss(chosen, rejected, batch.margins, torch.where(batch.is_tie, 0.5, 1.0))
            parts = [
                torch.ones_like(loss),
                loss,
                ~batch.is_tie,
                right * ~batch.is_tie,
                chosen,
                chosen**2,
                rejected,
                rejected**2,
                chosen - rejected,
            ]
            sums += torch.stack([part.double().sum() for part in parts]).cpu()
    count, loss, decided, right, chosen, chosen_sq, rejected, rejected_sq, margin = sum_over_ranks(*sums)
    engine.train()
    return {
        "eval/loss": loss / count,
        "eval/accuracy": right / max(1.0, decided),
        "eval/margin": margin / count,
        "eval/chosen_mean": chosen / count,
        "eval/chosen_std": _std(chosen, chosen_sq, count),
        "eval/rejected_mean": rejected / count,
        "eval/rejected_std": _std(rejected, rejected_sq, count),
    }


@torch.no_grad()
def score_statistics(
    engine: Any, rows: Sequence[list[int]], micro_batch: int, pad_token_id: int
) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores of token rows that end in EOS."""
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for picked in deal(range(len(rows)), [len(row) for row in rows], micro_batch, rank(), world_size()):
        ids = [rows[i] for i in picked] or [rows[0]]
        input_ids = pad_rows(ids, pad_token_id).to(device())
        lengths = torch.tensor([len(row) for row in ids], device=device())
        scores = token_scores(engine, input_ids, last_positions(lengths, input_ids.shape[1])).double().cpu()
        if picked:
            sums += torch.stack([torch.ones_like(scores).sum(), scores.sum(), (scores**2).sum()])
    count, total, squares = sum_over_ranks(*sums)
    return total / count, _std(total, squares, count)


def _std(total: float, squares: float, count: float) -> float:
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5

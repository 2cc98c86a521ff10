"""Loss and metrics of the process reward model on micro-batches and on held-out records."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.data.batching import Tokens, batches_of_rank
from common.model.engine_protocol import Engine
from common.model.forward import pad_token_id, token_scores
from common.runtime.distributed import sum_over_ranks
from common.runtime.progress import track
from common.training.means import Mean
from step2_reward.process.data import RIGHT, Batch, LabelledSteps, collate
from step2_reward.process.loss import step_loss


def step_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss of each step (N,), and the sums of a micro-batch that `figures` takes (6,)."""
    scores = token_scores(model, batch.input_ids, (batch.rows, batch.columns))  # (N,)
    losses, labels_right = step_loss(scores, batch.labels), batch.labels >= RIGHT
    is_correct = (scores.detach() > 0) == labels_right
    # The first error is found if no judgement up to it is false.
    misses = torch.zeros(len(batch.input_ids), device=scores.device)
    misses.index_add_(0, batch.rows, (~is_correct & batch.until_error).float())
    sums = losses.detach().sum(), is_correct.sum(), labels_right.sum(), torch.tensor(len(scores))
    of_records = (misses == 0).sum(), torch.tensor(len(misses))
    return losses, torch.stack([part.double().cpu() for part in (*sums, *of_records)])


def figures(
    loss: float, correct: float, right: float, steps: float, first_errors: float, records: float
) -> dict[str, Mean]:
    """Metrics from sums over all ranks: loss, steps judged correctly, steps labelled right, steps; records
    whose first wrong step is found (or none is where none is), records.
    """
    return {
        "loss": Mean(loss, steps),
        "accuracy": Mean(correct, steps),
        "first_error": Mean(first_errors, records),
        "right_share": Mean(right, steps),
    }


@torch.no_grad()
def evaluate(engine: Engine, rows: Sequence[LabelledSteps], size: int | Tokens) -> dict[str, float]:
    """Metrics of held-out records."""
    engine.eval()
    sums = torch.zeros(6, dtype=torch.float64)
    batches = batches_of_rank([row.length for row in rows], size)
    for indices, is_real in track("scoring records", batches, len(rows)):
        _, batch_sums = step_losses(engine, collate([rows[i] for i in indices], pad_token_id(engine)))
        sums += batch_sums * is_real
    engine.train()
    return {f"eval/{name}": mean.value for name, mean in figures(*sum_over_ranks(*sums)).items()}

"""Scoring of held-out pairs and of demonstrations with a reward model."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from common.data.batching import Tokens, batches_of_rank, pad_rows
from common.model.engine_protocol import Engine
from common.model.forward import last_positions, pad_token_id, token_scores
from common.runtime.distributed import device, sum_over_ranks, sum_tensor_over_ranks
from common.runtime.process import stop_requested
from common.runtime.progress import track
from step2_reward.data import Layout, Preference, collate
from step2_reward.loss import harm_loss, pairwise_loss
from step2_reward.shared_prompt import pair_scores


@torch.no_grad()
def score_pairs(
    model: nn.Module, rows: Sequence[Preference], size: int | Tokens, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Score the better and the worse response of every pair, row after row: (P,) each, fp64 on the CPU.

    model: an engine, or a plain model on this rank's device. Each rank scores its share, and returns all.
    """
    model.eval()
    starts = list(accumulate((len(row.pairs) for row in rows), initial=0))
    scores = torch.zeros(starts[-1], 2, dtype=torch.float64)
    shapes = layout.shapes(rows)
    batches = batches_of_rank([width for _, width in shapes], size, shapes)
    for batch_indices, is_real in track("scoring records", batches, len(rows)):
        batch_scores = pair_scores(model, collate([rows[i] for i in batch_indices], layout))
        if is_real:
            pair_indices = [pair for i in batch_indices for pair in range(starts[i], starts[i + 1])]
            scores[pair_indices] = torch.stack(batch_scores, dim=1).double().cpu()  # (p, 2)
    better, worse = sum_tensor_over_ranks(scores.to(device())).cpu().unbind(1)
    return better, worse


def evaluate(
    engine: Engine, rows: Sequence[Preference], size: int | Tokens, layout: Layout
) -> dict[str, float]:
    """Compute loss, accuracy, mean margin, and mean and std of chosen and rejected scores.

    The loss is a mean over records, as in training; the others are means over pairs. Accuracy excludes ties;
    equal scores count half. For a cost model, the loss has the terms of the signs, and `eval/sign_accuracy`
    is the share of responses on the right side of 0.
    """
    better, worse = score_pairs(engine, rows, size, layout)
    engine.train()
    facts = torch.tensor([fact for row in rows for fact in row.pair_facts], dtype=torch.float64)  # (P, 6)
    is_tie, margins, weights, targets, *signs = facts[:, 0].bool(), *facts[:, 1:].unbind(1)
    losses = pairwise_loss(better, worse, margins, targets)
    right = (better > worse).double() + 0.5 * (better == worse)
    metrics = {
        "eval/loss": (losses * weights).sum() / len(rows),
        "eval/accuracy": right[~is_tie].sum() / max(1, (~is_tie).sum()),
        "eval/margin": (better - worse).mean(),
        "eval/chosen_mean": better.mean(),
        "eval/chosen_std": better.std(correction=0),
        "eval/rejected_mean": worse.mean(),
        "eval/rejected_std": worse.std(correction=0),
    }
    if rows[0].signs:
        metrics["eval/loss"] += (sum(map(harm_loss, (better, worse), signs)) * weights).sum() / len(rows)
        metrics["eval/sign_accuracy"] = sign_accuracy(rows, better, worse)
    return {name: float(value) for name, value in metrics.items()}


def sign_accuracy(rows: Sequence[Preference], better: Tensor, worse: Tensor) -> float:
    """Share of responses whose cost has the right sign. better, worse: costs (P,) of the rows' pairs."""
    signs = torch.tensor([row.signs for row in rows], dtype=torch.float64)  # (P, 2)
    return (signs * torch.stack([better, worse], dim=1) > 0).double().mean().item()


@torch.no_grad()
def score_statistics(
    engine: Engine, rows: Sequence[list[int]], size: int | Tokens, output_dir: str
) -> tuple[float, float] | None:
    """Compute mean and standard deviation of the raw scores of rows of token ids that end in EOS.

    None when a stop of the run in `output_dir` was requested before the last micro-batch.
    """
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    batches = batches_of_rank([*map(len, rows)], size)
    for batch_indices, is_real in track("scoring demonstrations", batches, len(rows)):
        if stop_requested(output_dir):
            engine.train()
            return None
        ids = [rows[i] for i in batch_indices]
        input_ids = pad_rows(ids, pad_token_id(engine)).to(device())
        lengths = torch.tensor([len(row) for row in ids], device=device())
        scores = token_scores(engine, input_ids, last_positions(lengths, input_ids.shape[1])).double().cpu()
        if is_real:
            sums += torch.stack([torch.ones_like(scores).sum(), scores.sum(), (scores**2).sum()])
    engine.train()
    count, total, squares = sum_over_ranks(*sums)
    return total / count, _std(total, squares, count)


def _std(total: float, squares: float, count: float) -> float:
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5

"""The process reward model in plain PyTorch.

Cross-entropy of the label of each step (Wang et al. 2024, eq. 2), a mean over all labelled steps of a batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

from tests.recomputed.plain import Optimiser, adapted, load, load_scorer, rate_factor, scores


class Labelled(NamedTuple):
    """Token ids with EOS; the last token and the label of each step, None without one."""

    ids: list[int]
    ends: list[int]
    labels: list[float | None]


def train(
    path: str, records: Sequence[Labelled], held_out: Sequence[Labelled], options: Mapping[str, Any]
) -> tuple[LlamaForSequenceClassification, list[dict[str, float]]]:
    """Every step trains on all records. Returns the model and the lines of metrics."""
    model, steps = load_scorer(path, num_labels=1), options["max_steps"]
    size = load(path).lm_head.weight.shape[1]
    draw = torch.randn(1, size, generator=torch.Generator().manual_seed(options["seed"]))
    model.score.weight.data = draw / (size + 1) ** 0.5
    if options["lora_rank"]:
        model = adapted(model, options["lora_rank"], options["lora_alpha"], options["seed"])
    optimiser = Optimiser(model, (0.9, 0.95), options["adam_epsilon"], options["weight_decay"])
    lines = [evaluation(model, held_out, 0)]
    for step in range(steps):
        rate = options["learning_rate"] * rate_factor(options["lr_scheduler_type"], step, steps)
        loss, figures = losses(model, records)
        norm = optimiser.step(loss, rate, options["max_grad_norm"])
        lines.append({
            "step": step + 1, **{f"train/{name}": value for name, value in figures.items()},
            "train/lr": rate, "train/grad_norm": norm, "train/skipped_updates": 0,
        })  # fmt: skip
    return model, [*lines, evaluation(model, held_out, steps)]


def losses(
    model: LlamaForSequenceClassification, records: Sequence[Labelled]
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the metrics."""
    nats, correct, right, located = [], 0, 0, 0
    for record in records:
        probabilities = torch.sigmoid(scores(model, record.ids, 0.0, 1.0))
        judged, true = [], []
        for end, label in zip(record.ends, record.labels, strict=True):
            if label is not None:
                p = probabilities[end]
                nats.append(-label * torch.log(p) - (1 - label) * torch.log(1 - p))
                judged.append(bool(p > 0.5))
                true.append(label >= 0.5)
        correct += sum(a == b for a, b in zip(judged, true, strict=True))
        right += sum(true)
        located += [*judged, False].index(False) == [*true, False].index(False)
    count, loss = len(nats), sum(nats) / len(nats)
    return loss, {
        "loss": loss.item(), "accuracy": correct / count, "right_share": right / count,
        "first_error": located / len(records),
    }  # fmt: skip


@torch.no_grad()
def evaluation(
    model: LlamaForSequenceClassification, records: Sequence[Labelled], step: int
) -> dict[str, float]:
    return {"step": step} | {f"eval/{name}": value for name, value in losses(model, records)[1].items()}

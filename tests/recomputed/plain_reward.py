"""The reward model in plain PyTorch.

Bradley-Terry with margin (Touvron et al. 2023, eq. 2) and label smoothing (the label is wrong with
probability e), all pairs of a record with equal weight (Ouyang et al. 2022, eq. 1), centring (Eisenstein et
al. 2023, eq. 2), and the likelihood of the best response through the frozen output head (Yang et al. 2024).
For costs, the sign of each response: Dai et al. 2023 (Safe RLHF), eq. 6.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

from tests.recomputed.plain import Optimiser, adapted, load, load_scorer, rate_factor, scores, states


class Compared(NamedTuple):
    """Token ids of a prompt and of its responses, best first, each with EOS; equal ranks are ties."""

    prompt: list[int]
    responses: list[list[int]]
    ranks: list[int]
    margin: float = 0.0
    signs: tuple[float, ...] = ()  # of harm, for costs: the more harmful response is first

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.ranks)), 2))

    def is_tie(self, i: int, j: int) -> bool:
        return self.ranks[i] == self.ranks[j]


def train(
    path: str, records: Sequence[Compared], held_out: Sequence[Compared], options: Mapping[str, Any],
    seed: int,
) -> tuple[LlamaForSequenceClassification, list[dict[str, float]], tuple[float, float]]:  # fmt: skip
    """Every step trains on all records. Returns the model, the lines of metrics, and mean and standard
    deviation of the best responses' scores."""
    head = load(path).lm_head.weight.detach().clone()
    model, steps = (
        load_scorer(path, num_labels=1),
        options["max_steps"],
    )
    draw = torch.randn(1, head.shape[1], generator=torch.Generator().manual_seed(seed))
    model.score.weight.data = draw / (head.shape[1] + 1) ** 0.5
    if options["lora_rank"]:
        model = adapted(model, options["lora_rank"], options["lora_alpha"], seed)
    optimiser = Optimiser(model, (0.9, 0.95), options["adam_epsilon"], options["weight_decay"])
    lines = [evaluation(model, held_out, 0)]
    for step in range(steps):
        rate = options["learning_rate"] * rate_factor(options["lr_scheduler_type"], step, steps)
        loss, language, accuracy = losses(model, records, head, options)
        norm = optimiser.step(loss, rate, options["max_grad_norm"])
        lines.append({
            "step": step + 1, "train/loss": loss.item(),
            **({"train/lm_loss": language.item()} if options["lm_loss_coef"] else {}),
            "train/accuracy": accuracy, "train/lr": rate, "train/grad_norm": norm,
            "train/padding_share": padded(records, options), "train/skipped_updates": 0,
        })  # fmt: skip
    lines.append(evaluation(model, held_out, steps))
    with torch.no_grad():
        best = torch.stack([score_of(model, record, 0) for record in records])
    return model, lines, (best.mean().item(), best.std(correction=0).item())


def score_of(model: LlamaForSequenceClassification, record: Compared, number: int) -> Tensor:
    """The raw score of a response, at its EOS."""
    return scores(model, record.prompt + record.responses[number], 0.0, 1.0)[-1]


def preference_loss(
    better: Tensor, worse: Tensor, record: Compared, is_tie: bool, smoothing: float
) -> Tensor:
    difference = better - worse - (0.0 if is_tie else record.margin)
    right = 0.5 if is_tie else 1 - smoothing
    return -right * torch.log(torch.sigmoid(difference)) - (1 - right) * torch.log(torch.sigmoid(-difference))


def sign_loss(costs: Sequence[Tensor], record: Compared) -> Tensor | float:
    """-log sigmoid(s C) of both responses of a pair; 0 without signs."""
    return sum(-torch.log(torch.sigmoid(s * c)) for s, c in zip(record.signs, costs, strict=False))


def losses(
    model: LlamaForSequenceClassification,
    records: Sequence[Compared],
    head: Tensor,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor, float]:
    """The loss of a step, its language-model part, and the accuracy."""
    total, right, decided, nats, tokens = 0.0, 0, 0, 0.0, 0
    for record in records:
        one = [score_of(model, record, number) for number in range(len(record.responses))]
        for i, j in record.pairs:
            loss = preference_loss(one[i], one[j], record, record.is_tie(i, j), options["label_smoothing"])
            loss = loss + options["centre_coef"] * (one[i] + one[j]) ** 2 + sign_loss(one, record)
            total = total + loss / len(record.pairs)
            decided += not record.is_tie(i, j)
            right += bool(one[i] > one[j]) and not record.is_tie(i, j)
        ids, start = record.prompt + record.responses[0], len(record.prompt)
        logprobs = torch.log_softmax(states(model, ids) @ head.T, dim=-1)
        nats = nats - sum(logprobs[position - 1, ids[position]] for position in range(start, len(ids)))
        tokens += len(ids) - start
    language = nats / tokens
    return total / len(records) + options["lm_loss_coef"] * language, language, right / decided


@torch.no_grad()
def evaluation(
    model: LlamaForSequenceClassification, records: Sequence[Compared], step: int
) -> dict[str, float]:
    """The loss is a mean over records, without smoothing; the others are means over pairs."""
    loss, better, worse, right, sides = 0.0, [], [], [], []
    for record in records:
        one = [score_of(model, record, number) for number in range(len(record.responses))]
        for i, j in record.pairs:
            is_tie = record.is_tie(i, j)
            loss += float(
                preference_loss(one[i], one[j], record, is_tie, 0.0) + sign_loss(one, record)
            ) / len(record.pairs)
            sides += [float(s * c > 0) for s, c in zip(record.signs, one, strict=False)]
            right += [] if is_tie else [float(one[i] > one[j])]
            better.append(one[i].item())
            worse.append(one[j].item())
    better, worse = torch.tensor(better).double(), torch.tensor(worse).double()
    return {
        "step": step, "eval/loss": loss / len(records), "eval/accuracy": sum(right) / len(right),
        "eval/margin": (better - worse).mean(),
        "eval/chosen_mean": better.mean(), "eval/chosen_std": better.std(correction=0),
        "eval/rejected_mean": worse.mean(), "eval/rejected_std": worse.std(correction=0),
        **({"eval/sign_accuracy": sum(sides) / len(sides)} if sides else {}),
    }  # fmt: skip


def padded(records: Sequence[Compared], options: Mapping[str, Any]) -> float:
    """Share of padding, with a row for each record or for each response."""
    rows = []
    for record in records:
        lengths = [len(response) for response in record.responses]
        shared = [len(record.prompt) + sum(lengths)]
        separate = [len(record.prompt) + length for length in lengths]
        rows.append(shared if options["share_prompts"] == "yes" else separate)
    rows.sort(key=max)
    size = options["micro_batch_size"]
    batches = [sum(rows[start : start + size], []) for start in range(0, len(rows), size)]
    return 1 - sum(map(sum, rows)) / sum(len(batch) * max(batch) for batch in batches)

"""ILQL in plain PyTorch, one dialogue and one token at a time.

Snell et al. 2022: Q(s, a) -> r + gamma V(s'), V -> an expectile of min target Q, CQL's cross-entropy, and the
weighted cross-entropy of the policy. Sums over the two Q heads, means over all actions of a batch.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tests.recomputed.plain import Optimiser, adapted, load, rate_factor


class Scored(NamedTuple):
    """Token ids with EOS; the indices of the actions; the score."""

    ids: list[int]
    actions: list[int]
    score: float


class WithHeads(nn.Module):
    """A language model and its heads; the target heads are kept apart from what is trained."""

    def __init__(self, model: nn.Module, size: int, vocabulary: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        down = [nn.Linear(2 * size, vocabulary), nn.Linear(2 * size, vocabulary)]
        up = [nn.Linear(size, 2 * size), nn.Linear(size, 2 * size)]
        v_down = nn.Linear(2 * size, 1)
        self.model, self.v = model, nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), v_down)
        self.q = nn.ModuleList(nn.Sequential(a, nn.ReLU(), b) for a, b in zip(up, down, strict=True))
        self.target = [deepcopy(head).requires_grad_(False) for head in self.q]


def train(
    path: str, records: Sequence[Scored], held_out: Sequence[Scored], options: Mapping[str, Any]
) -> tuple[WithHeads, list[dict[str, float]]]:
    """Every step trains on all records. Returns the model and the lines of metrics."""
    plain, steps = load(path), options["max_steps"]
    size, vocabulary = plain.config.hidden_size, plain.config.vocab_size
    scores = [record.score for record in records]
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    scale = (mean, std) if options["standardise_scores"] else (0.0, 1.0)
    if options["lora_rank"]:
        plain = adapted(plain, options["lora_rank"], options["lora_alpha"], options["seed"])
    model = WithHeads(plain, size, vocabulary, options["seed"])
    optimiser = Optimiser(model, (0.9, 0.95), options["adam_epsilon"], options["weight_decay"])
    lines = [evaluation(model, held_out, scale, options, 0)]
    for step in range(steps):
        rate = options["learning_rate"] * rate_factor(options["lr_scheduler_type"], step, steps)
        loss, figures = losses(model, records, scale, options)
        norm = optimiser.step(loss, rate, options["max_grad_norm"])
        if (step + 1) % options["steps_for_target_q_sync"] == 0:
            with torch.no_grad():
                for target, head in zip(model.target, model.q, strict=True):
                    for old, new in zip(target.parameters(), head.parameters(), strict=True):
                        old.copy_(options["alpha"] * new + (1 - options["alpha"]) * old)
        lines.append({
            "step": step + 1, **{f"train/{name}": value for name, value in figures.items()},
            "train/lr": rate, "train/grad_norm": norm, "train/skipped_updates": 0,
        })  # fmt: skip
    return model, [*lines, evaluation(model, held_out, scale, options, steps)]


def states_and_logits(model: LlamaForCausalLM, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    outputs = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return outputs.hidden_states[-1][0], outputs.logits[0]


def losses(
    model: WithHeads, records: Sequence[Scored], scale: tuple[float, float], options: Mapping[str, Any]
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the metrics."""
    parts: dict[str, list[Tensor]] = {}

    def add(name: str, value: Tensor) -> None:
        parts.setdefault(name, []).append(value)

    for record in records:
        states, logits = states_and_logits(model.model, record.ids)
        for number, action in enumerate(record.actions):
            state, token, is_last = states[action - 1], record.ids[action], number == len(record.actions) - 1
            reward = (record.score - scale[0]) / scale[1] if is_last else 0.0
            after = 0.0 if is_last else model.v(states[record.actions[number + 1] - 1])[0].detach()
            value = model.v(state)[0]
            target = min(head(state)[token].detach() for head in model.target)
            rows = [head(state) for head in model.q]
            add("q_loss", sum((row[token] - reward - options["gamma"] * after) ** 2 for row in rows))
            weight = options["tau"] if target >= value else 1 - options["tau"]
            add("v_loss", weight * (target - value) ** 2)
            add("cql_loss", sum(-torch.log_softmax(row, 0)[token] for row in rows))
            nats = -torch.log_softmax(logits[action - 1], 0)[token]
            add("awac_loss", nats * torch.exp(options["beta"] * (target - value)).detach())
            add("q", min(row[token] for row in rows))
            add("target_q", target)
            add("value", value)
            add("advantage", target - value)
            if is_last:
                add("score_loss", (min(row[token] for row in rows) - reward) ** 2)
    means = {name: torch.stack(values).mean() for name, values in parts.items()}
    loss = means["q_loss"] + means["v_loss"]
    loss = loss + options["cql_scale"] * means["cql_loss"] + options["awac_scale"] * means["awac_loss"]
    return loss, {"loss": loss.item(), **{name: mean.item() for name, mean in means.items()}}


@torch.no_grad()
def evaluation(
    model: WithHeads, records: Sequence[Scored], scale: tuple[float, float], options: Mapping[str, Any],
    step: int,
) -> dict[str, float]:  # fmt: skip
    figures = losses(model, records, scale, options)[1]
    return {"step": step} | {f"eval/{name}": value for name, value in figures.items()}


def guided_logprobs(model: WithHeads, ids: Sequence[int], beta: float) -> Tensor:
    """Log-probabilities (T, V) after each token of softmax(log pi + beta (min target Q - V))."""
    states, logits = states_and_logits(model.model, ids)
    q = torch.minimum(*(head(states) for head in model.target))
    return torch.log_softmax(torch.log_softmax(logits, 1) + beta * (q - model.v(states)), 1)

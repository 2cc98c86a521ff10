"""Supervised fine-tuning in plain PyTorch: the mean negative log-likelihood per response token."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.recomputed.plain import Optimiser, load, padded_share, rate_factor, response_logprobs


class Text(NamedTuple):
    """Token ids, and where the response starts."""

    ids: list[int]
    start: int


def mean_nll(model: LlamaForCausalLM, texts: Sequence[Text]) -> Tensor:
    logprobs = torch.cat([response_logprobs(model, text.ids, text.start) for text in texts])
    return -logprobs.mean()


def train(
    path: str, texts: Sequence[Text], held_out: Sequence[Text], options: Mapping[str, Any], warmup: int
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """Every step trains on all texts. Returns the model and the lines of metrics."""
    model, steps = load(path), options["max_steps"]
    betas = options["adam_beta1"], options["adam_beta2"]
    optimiser = Optimiser(model, betas, options["adam_epsilon"], options["weight_decay"])
    lines = [evaluation(model, held_out, 0)]
    for step in range(steps):
        rate = options["learning_rate"] * rate_factor(options["lr_scheduler_type"], step, steps, warmup)
        loss = mean_nll(model, texts)
        norm = optimiser.step(loss, rate, options["max_grad_norm"])
        padding = padded_share([len(text.ids) for text in texts], options["micro_batch_size"])
        lines.append({
            "step": step + 1, "train/loss": loss.item(), "train/lr": rate, "train/grad_norm": norm,
            "train/padding_share": padding, "train/skipped_updates": 0,
        })  # fmt: skip
    return model, [*lines, evaluation(model, held_out, steps)]


@torch.no_grad()
def evaluation(model: LlamaForCausalLM, texts: Sequence[Text], step: int) -> dict[str, float]:
    loss = mean_nll(model, texts).item()
    return {"step": step, "eval/loss": loss, "eval/perplexity": math.exp(loss)}

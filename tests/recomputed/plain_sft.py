"""Supervised fine-tuning in plain PyTorch: the mean negative log-likelihood per response token."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.recomputed.plain import Optimiser, load, padded_share, response_logprobs


class Text(NamedTuple):
    """Token ids, and where the response starts."""

    ids: list[int]
    start: int


def mean_dft(model: LlamaForCausalLM, texts: Sequence[Text]) -> Tensor:
    """Wu et al. 2025: every token weighs its probability."""
    logprobs = torch.cat([response_logprobs(model, text.ids, text.start) for text in texts])
    return -(logprobs.exp().detach() * logprobs).mean()


def mean_nll(model: LlamaForCausalLM, texts: Sequence[Text]) -> Tensor:
    logprobs = torch.cat([response_logprobs(model, text.ids, text.start) for text in texts])
    return -logprobs.mean()


def train(
    path: str, texts: Sequence[Text], held_out: Sequence[Text], options: Mapping[str, Any],
    rates: Sequence[float], evaluations: Collection[int],
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:  # fmt: skip
    """Every step trains on all texts, at its learning rate. evaluations: steps after which to evaluate.

    Returns the model and the lines of metrics.
    """
    model = load(path)
    betas = options["adam_beta1"], options["adam_beta2"]
    optimiser = Optimiser(model, betas, options["adam_epsilon"], options["weight_decay"])
    lines = [evaluation(model, held_out, 0)]
    for step, rate in enumerate(rates, start=1):
        loss = (mean_dft if options.get("token_loss") == "dft" else mean_nll)(model, texts)
        norm = optimiser.step(loss, rate, options["max_grad_norm"])
        padding = padded_share([len(text.ids) for text in texts], options["micro_batch_size"])
        lines.append({
            "step": step, "train/loss": loss.item(), "train/lr": rate, "train/grad_norm": norm,
            "train/padding_share": padding, "train/skipped_updates": 0,
        })  # fmt: skip
        if step in evaluations:
            lines.append(evaluation(model, held_out, step))
    return model, lines


@torch.no_grad()
def evaluation(model: LlamaForCausalLM, texts: Sequence[Text], step: int) -> dict[str, float]:
    loss = mean_nll(model, texts).item()
    return {"step": step, "eval/loss": loss, "eval/perplexity": math.exp(loss)}

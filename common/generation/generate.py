"""Responses of a policy to any number of prompts, shared out among the ranks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from common.generation.decoding import Responses, sample_responses, uniforms_for
from common.generation.options import GenerationOptions
from common.model.engine import gathered_weights, make_frozen
from common.model.families import check_sampling, position_limit
from common.model.forward import base_model
from common.model.loading import load_causal_lm
from common.model.zero import frozen_config, unpartitioned
from common.runtime.distributed import device, gather_objects, rank
from common.runtime.options import UserError, world_size
from common.runtime.progress import track
from common.text.tokenizer import SegmentEncoder


class PlainEngine(nn.Module):
    """A model outside any engine, with what sampling asks of one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def zero_optimization_stage(self) -> int:
        return 0


class PolicyAnswer(NamedTuple):
    """A response as text, without the token that ended it."""

    text: str
    ended: bool  # by an end token rather than by the length limit


def load_policy(path: str, encoder: SegmentEncoder, zero: dict[str, Any]) -> nn.Module:
    """A frozen policy: partitioned at stage 3, else whole on every rank."""
    frozen = frozen_config(zero)
    model = make_frozen(load_causal_lm(path, encoder.tokenizer, frozen or unpartitioned(zero)), frozen)
    return model if frozen else PlainEngine(model)


def check_generation(options: GenerationOptions, config: PretrainedConfig) -> None:
    """Shorten --max_prompt_length to what the model's positions leave.

    Raises UserError when they leave nothing, and when responses cannot be sampled from the model's family.
    """
    check_sampling(config)
    positions = position_limit(config)
    if positions is None:
        return
    room = positions - options.max_response_length - 1  # a response cut off is scored with an EOS after it
    if room < 1:
        raise UserError(
            f"--max_response_length {options.max_response_length}: leaves no room for a prompt"
            f" in the model's {positions} positions"
        )
    options.max_prompt_length = min(options.max_prompt_length, room)


def prompts_of_rank(prompts: Sequence[list[int]]) -> list[int]:
    """Which of the prompts this rank responds to: its share of short and of long ones, the shorter first."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return order[rank() :: world_size()]


def generate(
    policy: Any, encoder: SegmentEncoder, prompts: Sequence[list[int]] | Mapping[int, list[int]],
    rows: Sequence[int], options: GenerationOptions, step: int, title: str = "",
) -> Responses:  # fmt: skip
    """Responses to these rows of the prompts, by a policy of `load_policy` or an engine that trains one.

    step: together with the seed and the row's number it decides what is sampled. All ranks must ask for
    equally many rows where a partitioned model is not gathered. title: of progress lines; none: be silent.
    """
    tokenizer, size = encoder.tokenizer, options.generation_batch_size
    parts: list[Responses] = []
    policy.eval()
    with gathered_weights(policy, options.gather_for_generation) as module:
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        for chunk in track(title, chunks, len(rows) * world_size()):
            uniforms = uniforms_for(options.seed, step, chunk, options.max_response_length)
            parts.append(
                sample_responses(
                    base_model(module),
                    [prompts[i] for i in chunk],
                    uniforms.to(device()),
                    options.temperature,
                    options.top_p,
                    base_model(module).end_ids,
                    tokenizer.pad_token_id,
                    synced_gpus=policy.zero_optimization_stage() == 3 and not options.gather_for_generation,
                    top_k=options.top_k,
                    num_tokens=base_model(module).num_tokens,
                )
            )
    return Responses(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def sample_answers(
    policy: Any, encoder: SegmentEncoder, prompts: Mapping[int, list[int]], options: GenerationOptions,
    step: int,
) -> dict[int, PolicyAnswer]:  # fmt: skip
    """An answer to each prompt, by its number, on every rank: see `generate`. What else is asked with it does
    not matter.
    """
    even = [*prompts, *[*prompts][:1] * (-len(prompts) % world_size())]
    mine = [even[place] for place in prompts_of_rank([prompts[number] for number in even])]
    drawn = generate(policy, encoder, prompts, mine, options, step)
    parts = (mine, *(part.tolist() for part in (drawn.ids, drawn.lengths, drawn.ended)))
    found = {
        number: PolicyAnswer(encoder.decode_response(prompts[number], ids[: length - ended]), ended)
        for number, ids, length, ended in zip(*parts, strict=True)
    }
    return {number: answer for part in gather_objects(found) for number, answer in part.items()}

"""Sample responses of a policy to prompts, distributed over the ranks."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple, TypeVar, assert_never

import torch
from torch import nn
from transformers import PretrainedConfig

from common.generation.decoding import Responses, sample_responses, uniforms_for
from common.generation.guidance import guide
from common.generation.options import GenerationOptions
from common.generation.vllm_sampler import VllmSampler
from common.model.engine import gathered_weights, make_frozen
from common.model.engine_protocol import Engine
from common.model.families import check_sampling, max_positions
from common.model.forward import base_model
from common.model.loading import load_causal_lm
from common.model.lora import merged_adapters
from common.model.zero import frozen_config, unpartitioned
from common.runtime.distributed import any_kernels, device, gather_objects, rank
from common.runtime.options import UserError, world_size
from common.runtime.progress import track
from common.text.tokenizer import SegmentEncoder


class PlainEngine(nn.Module):
    """A model without DeepSpeed, with the methods of an engine that sampling needs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def zero_optimization_stage(self) -> int:
        return 0


Options = TypeVar("Options", bound=GenerationOptions)
PolicyEngine = Engine | PlainEngine  # a policy in training, or from `load_policy`
Sampler = PolicyEngine | VllmSampler


class PolicyAnswer(NamedTuple):
    """A response as text, without its end token."""

    text: str
    ended: bool  # by an end token, not by the length limit


def load_policy(
    path: str, encoder: SegmentEncoder, zero: dict[str, Any], ilql_beta: float = 0.0
) -> PolicyEngine:
    """Load a frozen policy: partitioned at stage 3, else a full copy on every rank.

    ilql_beta: see `guide`.
    """
    frozen = frozen_config(zero)
    model = load_causal_lm(path, encoder.tokenizer, frozen or unpartitioned(zero))
    model = make_frozen(guide(model, path, ilql_beta), frozen)
    return model if frozen else PlainEngine(model)


def make_sampler(policy: PolicyEngine, path: str, options: GenerationOptions, longest: int = 0) -> Sampler:
    """What samples from the current weights of a policy: the policy, or another engine.

    path: model folder with its configuration. longest: most tokens of a prompt and its response; 0: by the
    options.
    """
    match options.rollout_engine:
        case "transformers":
            return policy
        case "vllm":
            longest = longest or options.max_prompt_length + options.max_response_length
            return VllmSampler(policy, path, options, longest)
        case _:
            assert_never(options.rollout_engine)


def load_sampler(
    path: str, encoder: SegmentEncoder, zero: dict[str, Any], options: GenerationOptions, longest: int = 0,
    ilql_beta: float = 0.0,
) -> Sampler:  # fmt: skip
    """Load a frozen policy only to sample from it. longest: as in `make_sampler`; ilql_beta: see `guide`."""
    sampler = make_sampler(load_policy(path, encoder, zero, ilql_beta), path, options, longest)
    if isinstance(sampler, VllmSampler):
        sampler.hold_weights()
    return sampler


def fit_prompt_length(options: Options, config: PretrainedConfig) -> Options:
    """A copy of the options whose --max_prompt_length leaves room for a response in the model's context.

    Raises UserError when no prompt fits, and when the model family does not support sampling.
    """
    check_sampling(config)
    positions = max_positions(config)
    room = positions - options.max_response_length - 1  # a truncated response is scored with an added EOS
    if room < 1:
        raise UserError(
            f"--max_response_length {options.max_response_length}: leaves no room for a prompt"
            f" in the model's context length of {positions} positions"
        )
    return dataclasses.replace(options, max_prompt_length=min(options.max_prompt_length, room))


def prompts_of_rank(prompts: Sequence[list[int]]) -> list[int]:
    """Indices of this rank's prompts, sorted by length: an equal share of short and long ones.

    Neighbours with the same prompt, which are read once, stay on a rank, as far as all ranks get as many.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    same = [len([*run]) for _, run in groupby(order, key=prompts.__getitem__)]
    size = math.gcd(*same, len(order) // world_size()) or 1
    blocks = [order[start : start + size] for start in range(0, len(order), size)]
    return [*chain(*blocks[rank() :: world_size()])]


def generate(
    policy: Sampler, encoder: SegmentEncoder, prompts: Sequence[list[int]] | Mapping[int, list[int]],
    rows: Sequence[int], options: GenerationOptions, step: int, title: str = "",
) -> Responses:  # fmt: skip
    """Sample a response for each of the rows (indices of prompts).

    step: seeds sampling, with --seed and the row index. If a partitioned model is not gathered, all ranks
    must pass the same number of rows. title: of progress lines; empty: none.
    """
    if isinstance(policy, VllmSampler):
        return policy.sample(prompts, rows, options, step, encoder.pad_token_id)
    size = options.generation_batch_size
    parts: list[Responses] = []
    synced_gpus = policy.zero_optimization_stage() == 3 and not options.gather_for_generation
    compiled = not synced_gpus and use_compiler(options, device().type == "cuda")
    policy.eval()
    with (
        any_kernels(),
        gathered_weights(policy, options.gather_for_generation) as module,
        merged_adapters(module, enabled=not synced_gpus),
    ):
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
                    encoder.pad_token_id,
                    synced_gpus=synced_gpus,
                    top_k=options.top_k,
                    num_tokens=base_model(module).num_tokens,
                    compiled=compiled,
                )
            )
    return Responses(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def use_compiler(options: GenerationOptions, on_gpu: bool) -> bool:
    """Whether --compile_generation compiles the decoding steps."""
    match options.compile_generation:
        case "auto":
            return on_gpu
        case "yes":
            return True
        case "no":
            return False
        case _:
            assert_never(options.compile_generation)


def sample_answers(
    policy: Sampler, encoder: SegmentEncoder, prompts: Mapping[int, list[int]],
    options: GenerationOptions, step: int,
) -> dict[int, PolicyAnswer]:  # fmt: skip
    """Sample an answer to each prompt with `generate`; returns all answers by prompt number, on every rank.

    An answer does not depend on the other prompts of the call.
    """
    padded = [*prompts, *[*prompts][:1] * (-len(prompts) % world_size())]  # equally many for every rank
    rank_rows = [padded[i] for i in prompts_of_rank([prompts[number] for number in padded])]
    drawn = generate(policy, encoder, prompts, rank_rows, options, step)
    columns = (rank_rows, *(column.tolist() for column in (drawn.ids, drawn.lengths, drawn.ended)))
    answers = {
        number: PolicyAnswer(encoder.decode_response(prompts[number], ids[: length - ended]), ended)
        for number, ids, length, ended in zip(*columns, strict=True)
    }
    return {number: answer for part in gather_objects(answers) for number, answer in part.items()}

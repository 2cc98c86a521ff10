"""The former decode loop, to compare with: caches and inputs grow with each token."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, GenerationConfig, PreTrainedModel

from common.generation.decoding import draw
from common.generation.prefill import IDLE_SHARE, group_by_length, select_rows
from common.text.transformers_internals import next_inputs


@torch.no_grad()
def former_responses(
    model: PreTrainedModel, prompts: list[list[int]], uniforms: Tensor, temperature: float, end: int,
    padding: int,
) -> Tensor:  # fmt: skip
    """Tokens (B, R) of all prompts; those after the end mean nothing."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[padding] * (longest - len(p)) + p for p in prompts], device=uniforms.device)
    lengths = torch.tensor([len(p) for p in prompts], device=ids.device)
    mask = (torch.arange(longest, device=ids.device) >= longest - lengths[:, None]).long()
    config = GenerationConfig(max_new_tokens=uniforms.shape[1], eos_token_id=end, pad_token_id=padding)
    decode = partial(_decode, uniforms=uniforms, temperature=temperature)
    return model.generate(ids, attention_mask=mask, generation_config=config, custom_generate=decode)


def _decode(
    model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, uniforms: Tensor,
    temperature: float, **inputs: Any,
) -> Tensor:  # fmt: skip
    (count, limit), device = uniforms.shape, uniforms.device
    rows = torch.arange(count, device=device)
    is_open = torch.ones_like(rows, dtype=torch.bool)
    logits = _read_prompts(model, input_ids, inputs)
    steps = []
    for step in range(limit):
        tokens, logprobs, _ = draw(logits, uniforms[rows, step], temperature, 1.0, 0)
        scattered = (part.new_zeros(count).index_copy(0, rows, part) for part in (tokens, logprobs))
        steps.append(tuple(scattered))
        is_open &= tokens != generation_config.eos_token_id
        num_open = int(is_open.sum())
        if not num_open or step == limit - 1:
            break
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if num_open <= (1 - IDLE_SHARE) * len(rows):
            order = is_open.nonzero().squeeze(-1)
            rows, input_ids, is_open = rows[order], input_ids[order], is_open[order]
            inputs["past_key_values"].reorder_cache(order)
            inputs |= select_rows(inputs, order)
        fed = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
        outputs = model(**fed, return_dict=True)
        inputs = next_inputs(model, outputs, inputs)
        logits = outputs.logits[:, -1]
    ids, _ = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
    return ids


def _read_prompts(model: PreTrainedModel, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    empty, mask = inputs["past_key_values"], inputs.get("attention_mask")
    lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
    logits, caches = [], []
    for group in group_by_length(lengths):
        width = max(lengths[group])
        caches.append(copy.deepcopy(empty))
        part = inputs | select_rows(inputs, [*range(len(lengths))[group]], width)
        part["past_key_values"] = caches[-1]
        fed = model.prepare_inputs_for_generation(input_ids[group, -width:], is_first_iteration=True, **part)
        outputs = model(**fed, return_dict=True)
        logits.append(outputs.logits[:, -1])
    inputs |= next_inputs(model, outputs, inputs)
    inputs["past_key_values"] = _concatenate(caches)
    return torch.cat(logits)


def _concatenate(caches: list[Cache]) -> Cache:
    joined = max(caches, key=lambda cache: cache.get_seq_length())
    for layer, parts in zip(
        joined.layers, zip(*(cache.layers for cache in caches), strict=True), strict=True
    ):
        width = layer.keys.shape[2]
        for name in ("keys", "values"):
            states = [getattr(part, name) for part in parts]
            setattr(layer, name, torch.cat([pad(s, (0, 0, width - s.shape[2], 0)) for s in states]))
    return joined

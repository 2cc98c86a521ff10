"""Draw responses with `transformers.generate`, the same ones for any number of ranks and any batch size."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from common.numeric.tensor_ops import scaled
from common.numeric.top_k_top_p import pack, restrict, support
from common.runtime.distributed import sum_tensor_over_ranks

# The part of a batch that may be padding of prompts, or rows that have ended: to have less costs more calls
# of the model, or copies of the cache.
IDLE_SHARE = 1 / 8
# Inputs with a line for each row; the last dimensions are rows and columns.
OF_ROWS = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
CACHE_NAMES = ("past_key_values", "cache_params")  # of attention, and of Mamba


class Responses(NamedTuple):
    """Sampled tokens, padded on the right, and the log-probability with which each was drawn."""

    ids: Tensor  # (B, R)
    lengths: Tensor  # (B,) with EOS, if there is one
    ended: Tensor  # (B,) bool: stopped by EOS rather than by the length limit
    logprobs: Tensor  # (B, R) under softmax(logits / temperature) of what may be drawn, 0 after the end
    support: Tensor  # (B, R, V / 8) uint8: what that was, packed; (B, R, 0) where every token may be drawn
    computed: Tensor  # (B,) positions that the model was run at for it, padding and idle steps included


def uniforms_for(seed: int, step: int, rows: Sequence[int], length: int) -> Tensor:
    """Uniform numbers (B, length) in [0, 1): a function of seed, step and the row's number."""
    streams = [np.random.default_rng((seed, 3, step, row)).random(length, dtype=np.float32) for row in rows]
    return torch.from_numpy(np.stack(streams))


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A token for each row of logits (B, V), by one number of uniforms (B,) each instead of a shared stream.

    It is the first whose cumulative probability exceeds the number, so that it depends on nothing but its
    row. Returns tokens (B,), the log-probabilities (B,) with which they were drawn, and what could be drawn,
    packed (B, V / 8), or (B, 0) where that is every token.
    """
    logits = scaled(logits, temperature)
    packed = torch.empty(len(logits), 0, dtype=torch.uint8, device=logits.device)
    if top_p < 1.0 or top_k:
        packed = pack(support(logits.softmax(-1), top_k, top_p))
    logprobs = restrict(logits, packed).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1), packed


@torch.no_grad()
def sample_responses(
    model: nn.Module, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float, top_p: float,
    eos_token_id: int | Sequence[int], pad_token_id: int, synced_gpus: bool, top_k: int = 0,
    num_tokens: int | None = None,
) -> Responses:  # fmt: skip
    """Responses of at most R tokens; uniforms (B, R). synced_gpus: a rank goes on for as long as any has to.

    eos_token_id: what ends a response, one id or several. num_tokens: only ids below it are drawn, where the
    model has more rows than the tokenizer has tokens.
    """
    device, longest = uniforms.device, max(map(len, prompts))
    input_ids = torch.tensor(
        [[pad_token_id] * (longest - len(p)) + p for p in prompts], device=device
    )  # (B, P)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    attention_mask = torch.arange(longest, device=device) >= longest - lengths[:, None]  # (B, P)
    # A model's own generation defaults (penalties, minimal lengths) would change what is sampled.
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    choose = partial(draw, temperature=temperature, top_p=top_p, top_k=top_k)
    try:
        return model.generate(
            input_ids,
            attention_mask=attention_mask.long(),
            generation_config=GenerationConfig(
                max_new_tokens=uniforms.shape[1],
                eos_token_id=eos_token_id if isinstance(eos_token_id, int) else [*eos_token_id],
                pad_token_id=pad_token_id,
            ),
            custom_generate=partial(
                _decode, uniforms=uniforms, choose=choose, synced_gpus=synced_gpus, num_tokens=num_tokens
            ),
        )
    finally:
        model.generation_config = defaults


def _decode(
    model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, uniforms: Tensor,
    choose: Callable[..., tuple[Tensor, Tensor, Tensor]], synced_gpus: bool, num_tokens: int | None,
    **inputs: Any,
) -> Responses:  # fmt: skip
    """The loop of `generate`, without rows that have ended: they would cost as much as those that go on."""
    (count, limit), device = uniforms.shape, uniforms.device
    ends = torch.tensor(generation_config.eos_token_id, device=device).view(-1)
    cache = next(name for name in CACHE_NAMES if name in inputs)
    rows = torch.arange(count, device=device)  # the b that are still in the batch
    is_open = torch.ones_like(rows, dtype=torch.bool)  # (b,)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs["output_router_logits"] = False  # nothing is learnt here
    logits, computed = _read_prompts(model, input_ids, inputs, cache, synced_gpus)  # (b, V), (B,)
    steps: list[tuple[Tensor, ...]] = []
    for step in range(limit):
        drawn = choose(logits[:, :num_tokens], uniforms[rows, step])
        steps.append(tuple(_placed(part, rows, count) for part in drawn))
        is_open &= ~torch.isin(drawn[0], ends)
        num_open = int(is_open.sum())
        any_open = sum_tensor_over_ranks(is_open.any().long()) if synced_gpus else num_open
        if not any_open or step == limit - 1:
            break
        input_ids = torch.cat([input_ids, drawn[0][:, None]], dim=1)
        if 0 < num_open <= (1 - IDLE_SHARE) * len(rows):
            kept = is_open.nonzero().squeeze(-1)
            rows, input_ids, is_open = rows[kept], input_ids[kept], is_open[kept]
            inputs[cache].reorder_cache(kept)  # which every kind of cache knows, for beam search
            inputs |= _rows_of(inputs, kept)
        computed[rows] += 1
        fed = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
        outputs = model(**fed, return_dict=True)
        inputs = model._update_model_kwargs_for_generation(outputs, inputs)
        logits = outputs.logits[:, -1]
    ids, logprobs, supports = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
    return _cut(ids, logprobs, supports, computed, limit, ends, generation_config.pad_token_id)


def _read_prompts(
    model: PreTrainedModel, input_ids: Tensor, inputs: dict[str, Any], cache: str, synced_gpus: bool
) -> tuple[Tensor, Tensor]:
    """Logits (B, V) after each prompt of input_ids (B, P), and the positions (B,) at which the model was run.

    Neighbours of like length are read together, without the padding that longer ones need. The cache in
    `inputs`, under the name of `cache`, then is what it would be had all been padded to P. A cache with
    recurrent states cannot be put together so: then all prompts are read at once.
    """
    empty, mask = inputs[cache], inputs.get("attention_mask")
    lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
    groups = like_lengths(lengths) if _is_plain(empty) and not synced_gpus else [slice(0, len(lengths))]
    logits, caches, computed = [], [], []
    for group in groups:
        width = max(lengths[group])
        caches.append(copy.deepcopy(empty))
        part = inputs | _rows_of(inputs, group, width) | {cache: caches[-1]}
        fed = model.prepare_inputs_for_generation(input_ids[group, -width:], is_first_iteration=True, **part)
        outputs = model(**fed, return_dict=True)
        logits.append(outputs.logits[:, -1])
        computed += [width] * len(outputs.logits)
    inputs |= model._update_model_kwargs_for_generation(outputs, inputs)
    inputs[cache] = _joined(caches) if len(caches) > 1 else caches[0]
    return torch.cat(logits), torch.tensor(computed, device=input_ids.device)


def like_lengths(lengths: Sequence[int]) -> list[slice]:
    """Runs of neighbours, each as long as it may get without more padding than IDLE_SHARE of it."""
    groups, start = [], 0
    for end in range(1, len(lengths) + 1):
        if end < len(lengths):
            run = lengths[start : end + 1]
            if sum(run) >= (1 - IDLE_SHARE) * max(run) * len(run):
                continue
        groups.append(slice(start, end))
        start = end
    return groups


def _is_plain(cache: Cache) -> bool:
    """Whether all that a model remembers are keys and values, which can be filled up on the left."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _joined(caches: list[Cache]) -> Cache:
    """One cache of the rows of all, filled up on the left to the longest, where attention is masked."""
    whole = max(caches, key=lambda cache: cache.get_seq_length())
    for layer, parts in zip(whole.layers, zip(*(cache.layers for cache in caches), strict=True), strict=True):
        width = layer.keys.shape[2]
        for name in ("keys", "values"):
            states = [getattr(part, name) for part in parts]  # (b, H, T, D) each
            filled = [pad(state, (0, 0, width - state.shape[2], 0)) for state in states]
            setattr(layer, name, torch.cat(filled))
    return whole


def _rows_of(inputs: dict[str, Any], rows: Tensor | slice, width: int = 0) -> dict[str, Tensor]:
    """The inputs of these rows, from the last `width` columns, or all of them."""
    return {name: inputs[name][..., rows, -width:] for name in OF_ROWS if inputs.get(name) is not None}


def _placed(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """Values (b, ...) of these rows among all B: (B, ...), 0 elsewhere."""
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, rows, part)


def _cut(
    sampled: Tensor, logprobs: Tensor, supports: Tensor, computed: Tensor, limit: int, ends: Tensor,
    pad_token_id: int,
) -> Responses:  # fmt: skip
    """End each row at its first EOS, of which `ends` (E,) are the ids, and widen everything to `limit`."""
    steps = sampled.shape[1]
    is_eos = torch.isin(sampled, ends)  # (B, steps)
    ended = is_eos.any(1)
    lengths = torch.where(ended, is_eos.int().argmax(1) + 1, steps)
    mask = torch.arange(limit, device=sampled.device) < lengths[:, None]  # (B, R)
    widen = (0, limit - steps)
    ids = pad(sampled, widen, value=pad_token_id).masked_fill(~mask, pad_token_id)
    logprobs = pad(logprobs, widen).masked_fill(~mask, 0.0)
    supports = pad(supports, (0, 0, *widen)).masked_fill(~mask[..., None], 0)
    return Responses(ids, lengths, ended, logprobs, supports, computed)

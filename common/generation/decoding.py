"""Sample responses with `transformers.generate`: the same for any number of ranks and any batch size."""

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
from common.numeric.top_k_top_p import Support, by_row, restrict, support
from common.runtime.distributed import sum_tensor_over_ranks
from common.text.transformers_internals import next_inputs

# Largest fraction of a batch that may be prompt padding or finished rows. A smaller one costs more forward
# passes or copies of the cache.
IDLE_SHARE = 1 / 8
# Model inputs per row; their last two dimensions are rows and columns.
ROW_INPUTS = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
CACHE_NAMES = ("past_key_values", "cache_params")  # of attention and of Mamba


class Responses(NamedTuple):
    """Sampled tokens, padded on the right, and their logprobs under the sampling distribution."""

    ids: Tensor  # (B, R)
    lengths: Tensor  # (B,) including EOS
    ended: Tensor  # (B,) bool: ended by EOS, not by the length limit
    logprobs: Tensor  # (B, R) of softmax(logits / temperature) over the support, 0 after the end
    support_sizes: Tensor  # (B, R) int32: number of tokens left by top-k and top-p; 0: all, or after the end
    support_ids: Tensor  # (S,) int32: those tokens, row after row
    computed: Tensor  # (B,) positions computed per row, including padding and idle steps


def uniforms_for(seed: int, step: int, rows: Sequence[int], length: int) -> Tensor:
    """Uniform numbers (B, length) in [0, 1), a function of seed, step and row index."""
    streams = [np.random.default_rng((seed, 3, step, row)).random(length, dtype=np.float32) for row in rows]
    return torch.from_numpy(np.stack(streams))


def draw(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor, Support]:
    """Sample one token per row of logits (B, V), by inverse transform sampling with uniforms (B,).

    The token is the first one whose cumulative probability exceeds the row's uniform number. So it depends on
    its row alone, not on a shared random stream. Returns tokens (B,), their logprobs (B,), and which tokens
    could be drawn.
    """
    logits = scaled(logits, temperature)
    allowed = support(logits, top_k, top_p)
    logprobs = restrict(logits, allowed).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1), allowed


@torch.no_grad()
def sample_responses(
    model: nn.Module, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float, top_p: float,
    eos_token_id: int | Sequence[int], pad_token_id: int, synced_gpus: bool, top_k: int = 0,
    num_tokens: int | None = None,
) -> Responses:  # fmt: skip
    """Sample responses of at most R tokens; uniforms (B, R).

    eos_token_id: one or several ids that end a response. synced_gpus: run forward passes until all ranks have
    finished, as ZeRO-3 needs. num_tokens: sample only ids below it, for models with more embedding rows than
    the tokenizer has tokens.
    """
    device, longest = uniforms.device, max(map(len, prompts))
    input_ids = torch.tensor(
        [[pad_token_id] * (longest - len(p)) + p for p in prompts], device=device
    )  # (B, P)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    attention_mask = torch.arange(longest, device=device) >= longest - lengths[:, None]  # (B, P)
    # The model's generation defaults (penalties, minimum lengths) would change the distribution.
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
    choose: Callable[..., tuple[Tensor, Tensor, Support]], synced_gpus: bool, num_tokens: int | None,
    **inputs: Any,
) -> Responses:  # fmt: skip
    """Decoding loop for `generate`; finished rows are removed from the batch, where they would cost time."""
    (count, limit), device = uniforms.shape, uniforms.device
    ends = torch.tensor(generation_config.eos_token_id, device=device).view(-1)
    cache = next(name for name in CACHE_NAMES if name in inputs)
    rows = torch.arange(count, device=device)  # (b,) rows still in the batch
    is_open = torch.ones_like(rows, dtype=torch.bool)  # (b,)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs["output_router_logits"] = False  # no load-balancing loss in sampling
    logits, computed = _read_prompts(model, input_ids, inputs, cache, synced_gpus)  # (b, V), (B,)
    steps: list[tuple[Tensor, ...]] = []
    supports: list[tuple[Tensor, Support]] = []  # of the rows of each step
    for step in range(limit):
        tokens, logprobs, allowed = choose(logits[:, :num_tokens], uniforms[rows, step])
        steps.append(tuple(_scatter_rows(part, rows, count) for part in (tokens, logprobs, allowed.sizes)))
        supports.append((rows, allowed))
        is_open &= ~torch.isin(tokens, ends)
        num_open = int(is_open.sum())
        any_open = sum_tensor_over_ranks(is_open.any().long()) if synced_gpus else num_open
        if not any_open or step == limit - 1:
            break
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if 0 < num_open <= (1 - IDLE_SHARE) * len(rows):
            open_rows = is_open.nonzero().squeeze(-1)
            rows, input_ids, is_open = rows[open_rows], input_ids[open_rows], is_open[open_rows]
            inputs[cache].reorder_cache(open_rows)  # every cache class has it, for beam search
            inputs |= _select_rows(inputs, open_rows)
        computed[rows] += 1
        fed = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
        outputs = model(**fed, return_dict=True)
        inputs = next_inputs(model, outputs, inputs)
        logits = outputs.logits[:, -1]
    ids, logprobs, sizes = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
    return _cut(ids, logprobs, sizes, supports, computed, limit, ends, generation_config.pad_token_id)


def _read_prompts(
    model: PreTrainedModel, input_ids: Tensor, inputs: dict[str, Any], cache: str, synced_gpus: bool
) -> tuple[Tensor, Tensor]:
    """Prefill: logits (B, V) after each prompt of input_ids (B, P), and the positions (B,) computed.

    Neighbouring prompts of similar length share a forward pass, which saves padding. Afterwards the cache
    `inputs[cache]` is the same as if all prompts had been padded to P. Caches with recurrent states cannot be
    concatenated; there all prompts are read in one pass.
    """
    empty, mask = inputs[cache], inputs.get("attention_mask")
    lengths = [input_ids.shape[1]] * len(input_ids) if mask is None else mask.sum(1).tolist()
    groups = group_by_length(lengths) if _is_plain(empty) and not synced_gpus else [slice(0, len(lengths))]
    logits, caches, computed = [], [], []
    for group in groups:
        width = max(lengths[group])
        caches.append(copy.deepcopy(empty))
        part = inputs | _select_rows(inputs, group, width) | {cache: caches[-1]}
        fed = model.prepare_inputs_for_generation(input_ids[group, -width:], is_first_iteration=True, **part)
        outputs = model(**fed, return_dict=True)
        logits.append(outputs.logits[:, -1])
        computed += [width] * len(outputs.logits)
    inputs |= next_inputs(model, outputs, inputs)
    inputs[cache] = _concatenate(caches) if len(caches) > 1 else caches[0]
    return torch.cat(logits), torch.tensor(computed, device=input_ids.device)


def group_by_length(lengths: Sequence[int]) -> list[slice]:
    """Split neighbouring rows into the longest groups with at most IDLE_SHARE of padding."""
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
    """Whether the cache holds only keys and values, which can be padded on the left."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _concatenate(caches: list[Cache]) -> Cache:
    """Concatenate caches along rows, padded on the left to the longest; attention masks the padding."""
    joined = max(caches, key=lambda cache: cache.get_seq_length())
    layers = zip(*(cache.layers for cache in caches), strict=True)
    for layer, parts in zip(joined.layers, layers, strict=True):
        width = layer.keys.shape[2]
        for name in ("keys", "values"):
            states = [getattr(part, name) for part in parts]  # (b, H, T, D) each
            padded = [pad(state, (0, 0, width - state.shape[2], 0)) for state in states]
            setattr(layer, name, torch.cat(padded))
    return joined


def _select_rows(inputs: dict[str, Any], rows: Tensor | slice, width: int = 0) -> dict[str, Tensor]:
    """Select rows of the inputs, and their last `width` columns (0: all)."""
    return {name: inputs[name][..., rows, -width:] for name in ROW_INPUTS if inputs.get(name) is not None}


def _scatter_rows(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """Scatter values (b, ...) to their rows among all B: (B, ...), 0 elsewhere."""
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, rows, part)


def _cut(
    sampled: Tensor, logprobs: Tensor, sizes: Tensor, supports: list[tuple[Tensor, Support]],
    computed: Tensor, limit: int, ends: Tensor, pad_token_id: int,
) -> Responses:  # fmt: skip
    """End each row at its first end token, one of `ends` (E,), and pad everything to `limit`."""
    steps = sampled.shape[1]
    is_eos = torch.isin(sampled, ends)  # (B, steps)
    ended = is_eos.any(1)
    lengths = torch.where(ended, is_eos.int().argmax(1) + 1, steps)
    mask = torch.arange(limit, device=sampled.device) < lengths[:, None]  # (B, R)
    widen = (0, limit - steps)
    ids = pad(sampled, widen, value=pad_token_id).masked_fill(~mask, pad_token_id)
    logprobs = pad(logprobs, widen).masked_fill(~mask, 0.0)
    sizes = pad(sizes, widen).masked_fill(~mask, 0)
    return Responses(ids, lengths, ended, logprobs, sizes, by_row(supports, lengths), computed)

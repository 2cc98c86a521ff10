"""Sample responses with `transformers.generate`: the same for any number of ranks and any batch size."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from common.generation.compiled import cache_size, compiled_if_equal
from common.generation.prefill import IDLE_SHARE, read_prompts
from common.generation.steps import DirectSteps, make_steps
from common.numeric.tensor_ops import scaled
from common.numeric.top_k_top_p import Support, by_row, restrict, support
from common.runtime.distributed import sum_tensor_over_ranks

# Steps from one look at what has ended to the next. On a GPU the host must wait for it.
CHECK_EVERY = {"cpu": 1, "cuda": 8}
CACHE_NAMES = ("past_key_values", "cache_params")  # of attention and of Mamba


class Responses(NamedTuple):
    """Sampled tokens, padded on the right, and their logprobs under the sampling distribution."""

    ids: Tensor  # (B, R)
    lengths: Tensor  # (B,) including EOS
    ended: Tensor  # (B,) bool: ended by EOS, not by the length limit
    logprobs: Tensor  # (B, R) of softmax(logits / temperature) over the support, 0 after the end
    support_sizes: Tensor  # (B, R) int32: number of tokens left by top-k and top-p; 0: all, or after the end
    support_ids: Tensor  # (S,) int32: those tokens, row after row
    computed: Tensor  # (B,) positions computed, including padding and idle steps; see `Prefill`


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
    cumulative = cumulative_sums(logprobs.exp())
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1), allowed


def cumulative_sums(probabilities: Tensor) -> Tensor:
    """Cumulative sums of rows (B, V). CUDA's kernel for one row alone gives other last digits every time."""
    if len(probabilities) == 1:
        return probabilities.expand(2, -1).cumsum(-1)[:1]
    return probabilities.cumsum(-1)


@torch.no_grad()
def sample_responses(
    model: nn.Module, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float, top_p: float,
    eos_token_id: int | Sequence[int], pad_token_id: int, synced_gpus: bool, top_k: int = 0,
    num_tokens: int | None = None, compiled: bool = False,
) -> Responses:  # fmt: skip
    """Sample responses of at most R tokens; uniforms (B, R).

    eos_token_id: one or several ids that end a response. synced_gpus: run forward passes until all ranks have
    finished, as ZeRO-3 needs. num_tokens: sample only ids below it, for models with more embedding rows than
    the tokenizer has tokens. compiled: compile the decoding steps, for families with a cache in place.
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
                _decode,
                uniforms=uniforms,
                choose=choose,
                synced_gpus=synced_gpus,
                num_tokens=num_tokens,
                compiled=compiled,
            ),
        )
    finally:
        model.generation_config = defaults


def _decode(
    model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, uniforms: Tensor,
    choose: Callable[..., tuple[Tensor, Tensor, Support]], synced_gpus: bool, num_tokens: int | None,
    compiled: bool, **inputs: Any,
) -> Responses:  # fmt: skip
    """Decoding loop for `generate`; finished rows are removed from the batch, where they would cost time."""
    (count, limit), device = uniforms.shape, uniforms.device
    ends = torch.tensor(generation_config.eos_token_id, device=device).view(-1)
    cache_name = next(name for name in CACHE_NAMES if name in inputs)
    columns = input_ids.shape[1] + limit - 1  # the last token of a response is no input
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs["output_router_logits"] = False  # no load-balancing loss in sampling
    size = cache_size(count, columns) if compiled else (count, columns)
    logits, inputs, computed = read_prompts(model, input_ids, inputs, cache_name, size, synced_gpus)
    steps = make_steps(model, input_ids, inputs, cache_name, size[1])
    if compiled and isinstance(steps, DirectSteps):
        steps = compiled_if_equal(steps, input_ids[:, -1])
    rows = torch.arange(count, device=device)  # (b,) rows still in the batch
    is_open = torch.ones_like(rows, dtype=torch.bool)  # (b,)
    ids = torch.zeros(count, limit, dtype=torch.long, device=device)
    logprobs, sizes = torch.zeros_like(uniforms), torch.zeros_like(ids, dtype=torch.int32)
    supports: list[tuple[Tensor, Support]] = []  # of the rows of each step
    check_every = CHECK_EVERY.get(device.type, CHECK_EVERY["cuda"])
    for step in range(limit):
        tokens, logprobs[rows, step], allowed = choose(logits[:, :num_tokens], uniforms[rows, step])
        ids[rows, step], sizes[rows, step] = tokens, allowed.sizes
        supports.append((rows, allowed))
        is_open &= ~torch.isin(tokens, ends)
        if step == limit - 1:
            break
        if (step + 1) % check_every == 0:
            order = open_rows(is_open.tolist())
            any_open = sum_tensor_over_ranks(is_open.any().long()) if synced_gpus else order
            if not any_open:
                break
            if 0 < len(order) <= (1 - IDLE_SHARE) * len(rows):
                rows, tokens, is_open = rows[order], tokens[order], is_open[order]
                steps.select(order)
        computed[rows] += 1
        logits = steps.logits(tokens)
    return _cut(ids, logprobs, sizes, supports, computed, ends, generation_config.pad_token_id)


def open_rows(is_open: list[bool]) -> list[int]:
    """The open rows, as many as possible of them in their places, since moving a row copies its cache."""
    count = sum(is_open)
    later = (row for row, is_row_open in enumerate(is_open) if is_row_open and row >= count)
    return [row if is_open[row] else next(later) for row in range(count)]


def _cut(
    sampled: Tensor, logprobs: Tensor, sizes: Tensor, supports: list[tuple[Tensor, Support]],
    computed: Tensor, ends: Tensor, pad_token_id: int,
) -> Responses:  # fmt: skip
    """End each row of sampled (B, R) at its first end token, one of `ends` (E,)."""
    limit = sampled.shape[1]
    is_eos = torch.isin(sampled, ends)  # (B, R)
    ended = is_eos.any(1)
    lengths = torch.where(ended, is_eos.int().argmax(1) + 1, limit)
    mask = torch.arange(limit, device=sampled.device) < lengths[:, None]  # (B, R)
    ids, logprobs = sampled.masked_fill(~mask, pad_token_id), logprobs.masked_fill(~mask, 0.0)
    sizes = sizes.masked_fill(~mask, 0)
    return Responses(ids, lengths, ended, logprobs, sizes, by_row(supports, lengths), computed)

"""Rows of tokens that hold a prompt and several responses to it, so that the prompt is encoded once.

The position ids of each response continue from the prompt, and a mask hides the responses from each other.
Models that cannot do so get one row per response.
"""

import os
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Literal, NamedTuple, assert_never

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from common.data.batching import pad_rows
from common.model.families import max_positions
from common.model.forward import base_model
from common.model.load_balancing import has_balance_loss
from common.model.probe import last_states, states_agree
from common.runtime.distributed import device, log_once, sum_over_ranks
from common.runtime.options import world_size
from common.text.transformers_internals import attention_implementation


class Sharing(NamedTuple):
    """How many responses share a row with their prompt, and how long both may be, in tokens."""

    responses: int = 1  # 1: each response has a row of its own
    prompt_length: int = 0
    response_length: int = 0


SEPARATE = Sharing()


class SharedRow(NamedTuple):
    """A prompt and responses to it."""

    ids: list[int]
    position_ids: list[int]
    segments: list[int]  # 0: prompt; 1, 2, ...: responses


def shared_row(prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> SharedRow:
    """Lay out a prompt and its responses on one row."""
    start = len(prompt_ids)
    return SharedRow(
        [*prompt_ids, *chain(*responses)],
        [*range(start), *chain(*(range(start, start + len(response)) for response in responses))],
        [0] * start + [number for number, response in enumerate(responses, 1) for _ in response],
    )


def with_common_prompt(texts: Sequence[list[int]]) -> SharedRow:
    """Lay out texts on one row; what all of them begin with, but for the last token, is the prompt."""
    prompt = os.path.commonprefix([text[:-1] for text in texts])
    return shared_row(prompt, [text[len(prompt) :] for text in texts])


def pad_shared_rows(rows: Sequence[SharedRow], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad R rows on the right: ids, position ids and segments, (R, T) each; segment -1: padding."""
    ids, position_ids, segments = zip(*rows, strict=True)
    return pad_rows(ids, pad_token_id), pad_rows(position_ids, 0), pad_rows(segments, -1)


def last_of_segments(segments: Tensor) -> Tensor:
    """True at the last token of each response: segments (R, T) -> (R, T) bool."""
    after = pad(segments[:, 1:], (0, 1), value=-1)
    return (segments > 0) & (segments != after)


def layout_inputs(model: nn.Module, position_ids: Tensor, segments: Tensor) -> dict[str, Tensor]:
    """Inputs of a model besides the ids of shared rows: position_ids, segments (R, T)."""
    mask = prompt_mask(segments, base_model(model).dtype)
    return {"position_ids": position_ids, "attention_mask": mask}


def prompt_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask of shared rows: segments (R, T) -> (R, 1, T, T) of `dtype`.

    A token attends to itself and to earlier tokens of the prompt and of its own segment.
    """
    width = segments.shape[1]
    is_causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    key, query = segments.unsqueeze(1), segments.unsqueeze(2)  # (R, 1, T), (R, T, 1)
    attends = is_causal & ((key == 0) | (key == query))  # (R, T, T)
    mask = torch.zeros(attends.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~attends, torch.finfo(dtype).min).unsqueeze(1)


def work(shapes: Sequence[tuple[int, int]], hidden_size: int, is_shared: bool) -> int:
    """Estimate multiplications per layer and unit of width, to compare layouts.

    shapes: of each batch of rows, their number and the tokens of the longest. Each token takes 12
    hidden_size^2 in matrices (Kaplan et al. 2020, 2.1) and 2 hidden_size per token of its row in attention.
    Kernels skip half of a causal mask, but nothing of other masks.
    """
    per_token = 2 if is_shared else 1
    return sum(count * (12 * hidden_size * n + per_token * n**2) for count, n in shapes)


def wants_sharing(how: Literal["auto", "yes", "no"], separate_work: int, shared_work: int) -> bool:
    """The choice of --share_prompts, for models that can share them."""
    match how:
        case "no":
            return False
        case "yes":
            return True
        case "auto":
            return separate_work > shared_work
        case _:
            assert_never(how)


def responses_per_row(model: nn.Module, sharing: Sharing) -> int:
    """1 for a model that cannot share prompts, which is logged. Every rank must call this."""
    if sharing.responses == 1 or can_share_prompts(model, sharing):
        return sharing.responses
    kind = base_model(model).config.model_type
    log_once(f"this model of type {kind!r} cannot share prompts: each response is encoded with its prompt")
    return 1


@cache
def can_share_prompts(model: nn.Module, sharing: Sharing) -> bool:
    """Check that the model encodes responses that share a prompt as it encodes them separately.

    It fails for attention kernels without masks, position encodings that ignore `position_ids`, and sliding
    windows. The last hidden states are compared at every position of random responses of the maximum length.
    A load-balancing loss counts the tokens of a prompt, so it would change. Every rank must call this.
    """
    base = base_model(model)
    if attention_implementation(base.config) not in ("eager", "sdpa") or has_balance_loss(base):
        return False
    room = max_positions(base.config) // 2
    start, length = min(sharing.prompt_length, room), min(sharing.response_length, room)
    vocabulary, random = base.config.get_text_config().vocab_size, np.random.default_rng(0)
    prompt = random.integers(vocabulary, size=start).tolist()
    responses = random.integers(vocabulary, size=(sharing.responses, length)).tolist()
    ids, position_ids, segments = torch.tensor([shared_row(prompt, responses)], device=device()).unbind(1)
    separate_ids = torch.tensor([prompt + response for response in responses], device=device())
    inputs = layout_inputs(model, position_ids, segments)
    can_share = states_agree(
        model,
        lambda: last_states(model, base, input_ids=separate_ids)[:, start:].flatten(0, 1),  # (N, hidden size)
        lambda: last_states(model, base, input_ids=ids, **inputs)[0, start:],
    )
    return sum_over_ranks(can_share)[0] == world_size()

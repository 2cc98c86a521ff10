"""Read prompts: like lengths in one forward pass, and a prompt with several responses once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.generation.cache import InPlaceCache, JoinedCache, can_pad, is_in_place
from common.text.transformers_internals import next_inputs

# Largest fraction of a batch that may be prompt padding or finished rows. A smaller one costs more forward
# passes or copies of the cache.
IDLE_SHARE = 1 / 8
# Model inputs per row; their last two dimensions are rows and columns.
ROW_INPUTS = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


class Prefill(NamedTuple):
    """The batch after its prompts."""

    logits: Tensor  # (B, V) after each prompt
    inputs: dict[str, Any]  # of the next step, with the cache of all rows
    computed: Tensor  # (B,) positions computed; those of a prompt with several rows at its first row


def read_prompts(
    model: PreTrainedModel, input_ids: Tensor, inputs: dict[str, Any], cache_name: str,
    size: tuple[int, int], synced_gpus: bool,
) -> Prefill:  # fmt: skip
    """Read the prompts input_ids (B, P), padded on the left. size: rows and columns of a cache in place.

    Neighbouring prompts of similar length share a forward pass, which saves padding. Afterwards the cache
    is the same as if all prompts had been padded to P. Caches with recurrent states cannot be concatenated;
    there all prompts are read in one pass, as with synced_gpus, where all ranks need equally many passes.
    """
    empty, mask = inputs[cache_name], inputs.get("attention_mask")
    width = input_ids.shape[1]
    lengths = [width] * len(input_ids) if mask is None else mask.sum(1).tolist()
    firsts = first_rows(input_ids, lengths)
    groups = group_by_length([lengths[row] for row in firsts])
    if synced_gpus or not can_pad(empty):
        groups = [slice(0, len(firsts))]
    ends = [*firsts[1:], len(input_ids)]
    count = [end - row for row, end in zip(firsts, ends, strict=True)]
    cache = InPlaceCache(empty, len(input_ids), size) if is_in_place(empty) else JoinedCache(empty)
    logits, computed = [], torch.zeros(len(input_ids), dtype=torch.long)
    for group in groups:
        prompts = firsts[group]
        longest = max(lengths[row] for row in prompts)
        owners = torch.arange(len(prompts)).repeat_interleave(torch.tensor(count[group])).to(input_ids.device)
        part = inputs | select_rows(inputs, prompts, longest)
        part[cache_name] = cache.group(slice(prompts[0], prompts[0] + len(owners)), width - longest, owners)
        ids = input_ids[prompts, -longest:]
        fed = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **part)
        outputs = model(**fed, return_dict=True)
        logits.append(outputs.logits[owners, -1])
        computed[prompts] = longest
    following = inputs | next_inputs(model, outputs, inputs) | {cache_name: cache.join()}
    return Prefill(torch.cat(logits), following, computed.to(input_ids.device))


def first_rows(input_ids: Tensor, lengths: Sequence[int]) -> list[int]:
    """Rows of input_ids (B, P), padded on the left, whose prompt is not that of the row before."""
    if len(input_ids) == 1:
        return [0]
    is_new = (input_ids[1:] != input_ids[:-1]).any(1).tolist()
    return [0, *(row for row, new in enumerate(is_new, start=1) if new or lengths[row] != lengths[row - 1])]


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


def select_rows(inputs: dict[str, Any], rows: Tensor | list[int], width: int = 0) -> dict[str, Tensor]:
    """Select rows of the inputs, and their last `width` columns (0: all)."""
    return {
        name: inputs[name][..., rows, :][..., -width:] for name in ROW_INPUTS if inputs.get(name) is not None
    }

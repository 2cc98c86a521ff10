"""Packing: bin packing of demonstrations into rows, and a check that attention stays within each."""

import bisect
import heapq
import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn

from common.data.batching import Tokens, batches_of_rank, micro_batch, with_dummies
from common.model.forward import base_model, response_logits
from common.model.unpadded import can_unpad
from common.runtime.distributed import log, on_cpu, rank
from common.runtime.options import UserError, world_size
from common.text.transformers_internals import attention_implementation
from step1_sft.data import Demonstration, collate
from step1_sft.options import SFTOptions

Row = list[int]  # indices of the examples in a row
PROBE = 16  # tokens per document of the packing check
LONG = 2048  # tokens of a row; the mask of a longer one may cost more than the padding that packing saves
# Error over logits, as standard deviations: rounding stays below, attention across documents is far above.
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 0.1


def micro_batches(lengths: Sequence[int], options: SFTOptions) -> list[tuple[list[Row], bool]]:
    """Divide a batch of examples of these lengths; see `batches_of_rank`.

    Without --packing every row is one example.
    """
    size = micro_batch(options)
    if options.packing:
        if isinstance(size, Tokens):
            size = size // options.max_length
        batch = range(len(lengths))
        packed = deal_packed(batch, lengths, size, options.max_length, rank(), world_size())
        return with_dummies(packed, dummy=[[0]])
    return [([[i] for i in indices], is_real) for indices, is_real in batches_of_rank(lengths, size)]


def deal_packed(
    batch: Sequence[int], lengths: Sequence[int], micro_batch: int, max_length: int, rank: int, ranks: int
) -> list[list[Row]]:
    """Pack examples into micro-batches of at most `micro_batch` rows of at most `max_length` tokens.

    Best fit gives the smallest number of micro-batches. Evenly filled rows in as many micro-batches can have
    less padding and idle time, so the fastest division is chosen.
    """
    full = best_fit(batch, lengths, max_length)
    parts = math.ceil(len(full) / (micro_batch * ranks)) * ranks
    even = [spread(batch, lengths, parts * rows) for rows in range(micro_batch, 0, -1)]
    fitting = [rows for rows in (*even, full) if max(_tokens(rows, lengths)) <= max_length]
    divisions = [_divide(rows, lengths, parts) for rows in fitting]
    return min(divisions, key=lambda division: _duration(division, lengths, ranks))[rank::ranks]


def best_fit(batch: Sequence[int], lengths: Sequence[int], max_length: int) -> list[Row]:
    """Pack into few rows: longest first, each into the fullest row with room (best fit decreasing)."""
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), in order
    for example in sorted(batch, key=lambda i: -lengths[i]):
        index = bisect.bisect_left(room, (lengths[example], 0))
        left, row = room.pop(index) if index < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (left - lengths[example], row))
    return rows


def spread(batch: Sequence[int], lengths: Sequence[int], count: int) -> list[Row]:
    """Spread over `count` rows: longest example first, each into the emptiest row (Graham 1969, LPT)."""
    rows: list[Row] = [[] for _ in range(min(count, len(batch)))]
    filled = [(0, row) for row in range(len(rows))]
    for example in sorted(batch, key=lambda i: -lengths[i]):
        tokens, row = filled[0]
        rows[row].append(example)
        heapq.heapreplace(filled, (tokens + lengths[example], row))
    return rows


@torch.no_grad()
def check_packing(model: nn.Module, max_length: int) -> None:
    """Raise UserError, on all ranks, unless packed documents have the same logits as unpacked ones.

    Long rows get a line in the log where attention kernels read a mask.
    """
    inner = base_model(model)
    vocabulary = inner.config.get_text_config().vocab_size
    size, generator = min(PROBE, max_length // 2), torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, size), generator=generator).tolist()
    first, second = (Demonstration(row, [False] + [True] * (size - 1)) for row in ids)
    error = math.inf
    if "position_ids" in inspect.signature(inner.forward).parameters:
        unpacked, packed = (
            response_logits(model, batch.input_ids, batch.positions, batch.position_ids).float()
            for batch in (collate([[first], [second], [second]], 0), collate([[first, second], [second]], 0))
        )  # (3 (size - 1), V) each
        error = float((packed - unpacked).std() / unpacked.std())
    is_exact = next(model.parameters()).dtype == torch.float32
    if not error <= (TOLERANCE if is_exact else TOLERANCE_16_BITS):
        raise UserError(
            f"--packing: a model of type {inner.config.model_type} attends across packed examples; remove the"
            " option"
        )
    kernels = attention_implementation(inner.config)
    reads_mask = kernels in ("sdpa", "eager") and not can_unpad(model, inner)
    if max_length > LONG and reads_mask and not on_cpu():
        log(
            f"--packing: {kernels} kernels read a mask of {max_length} x {max_length} for each row, at a cost"
            " of time and memory; --attn_implementation flash_attention_2 needs none"
        )


def _tokens(rows: Sequence[Row], lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[i] for i in row) for row in rows]


def _divide(rows: list[Row], lengths: Sequence[int], parts: int) -> list[list[Row]]:
    """Group rows of similar length into `parts` micro-batches of about equal size."""
    ordered = sorted(rows, key=lambda row: sum(lengths[i] for i in row))
    cuts = [len(rows) * part // parts for part in range(parts + 1)]
    return [ordered[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False)]


def _duration(division: list[list[Row]], lengths: Sequence[int], ranks: int) -> int:
    """Sum the tokens, padding included, of the slowest rank of every round."""
    sizes = [len(rows) * max(_tokens(rows, lengths), default=0) for rows in division]
    return sum(max(sizes[start : start + ranks]) for start in range(0, len(sizes), ranks))

"""Several demonstrations in one row: which go together, and whether a model keeps them apart."""

import bisect
import heapq
import inspect
import math
from collections.abc import Sequence

import torch
from torch import nn

from common.data.batching import deal
from common.model.forward import base_model, response_logits
from common.runtime.distributed import rank
from common.runtime.options import UserError, world_size
from step1_sft.data import Demonstration, collate
from step1_sft.options import SFTOptions

Row = list[int]  # the examples that share a row
PROBE = 16  # tokens of a document that the model is tried with
# Standard deviation of the error over that of the logits: rounding stays below, a leak is far above.
TOLERANCE, TOLERANCE_16_BITS = 1e-3, 0.1


def micro_batches(lengths: Sequence[int], options: SFTOptions) -> list[list[Row]]:
    """This rank's micro-batches of examples of these lengths, the same number on every rank.

    Without --packing every row is one example. Where there are too few rows, some micro-batches are empty.
    """
    batch, size = range(len(lengths)), options.micro_batch_size
    if options.packing:
        return deal_packed(batch, lengths, size, options.max_length, rank(), world_size())
    return [[[i] for i in chosen] for chosen in deal(batch, lengths, size, rank(), world_size())]


def deal_packed(
    batch: Sequence[int], lengths: Sequence[int], micro_batch: int, max_length: int, rank: int, ranks: int
) -> list[list[Row]]:
    """Micro-batches of at most `micro_batch` rows, each row of at most `max_length` tokens.

    Best fit says how few micro-batches will do. In that many, rows filled evenly, by any number of them, may
    leave less padding and keep ranks waiting less than full ones: the fastest division is taken.
    """
    full = best_fit(batch, lengths, max_length)
    parts = math.ceil(len(full) / (micro_batch * ranks)) * ranks
    even = [spread(batch, lengths, parts * rows) for rows in range(micro_batch, 0, -1)]
    fitting = [rows for rows in (*even, full) if max(_tokens(rows, lengths)) <= max_length]
    divisions = [_divide(rows, lengths, parts) for rows in fitting]
    return min(divisions, key=lambda division: _duration(division, lengths, ranks))[rank::ranks]


def best_fit(batch: Sequence[int], lengths: Sequence[int], max_length: int) -> list[Row]:
    """Few rows: the longest example first, each into the fullest row that has room (best fit decreasing)."""
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), in order
    for example in sorted(batch, key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[example], 0))
        left, row = room.pop(place) if place < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (left - lengths[example], row))
    return rows


def spread(batch: Sequence[int], lengths: Sequence[int], count: int) -> list[Row]:
    """At most `count` even rows: the longest example first, each into the emptiest row (Graham 1969, LPT)."""
    rows: list[Row] = [[] for _ in range(min(count, len(batch)))]
    filled = [(0, row) for row in range(len(rows))]
    for example in sorted(batch, key=lambda i: -lengths[i]):
        tokens, row = filled[0]
        rows[row].append(example)
        heapq.heapreplace(filled, (tokens + lengths[example], row))
    return rows


@torch.no_grad()
def check_packing(model: nn.Module, max_length: int) -> None:
    """Raise UserError, on all ranks, unless documents in one row have the logits that each has alone."""
    inner = base_model(model)
    vocabulary = inner.config.get_text_config().vocab_size
    size, generator = min(PROBE, max_length // 2), torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, size), generator=generator).tolist()
    first, second = (Demonstration(row, [False] + [True] * (size - 1)) for row in ids)
    error = math.inf
    if "position_ids" in inspect.signature(inner.forward).parameters:
        alone, packed = (
            response_logits(model, batch.input_ids, batch.positions, batch.position_ids).float()
            for batch in (collate([[first], [second], [second]], 0), collate([[first, second], [second]], 0))
        )  # (3 (size - 1), V) each
        error = float((packed - alone).std() / alone.std())
    is_exact = next(model.parameters()).dtype == torch.float32
    if not error <= (TOLERANCE if is_exact else TOLERANCE_16_BITS):
        raise UserError(
            f"--packing: a model of type {inner.config.model_type} does not keep the examples of a row apart;"
            " leave the option out"
        )


def _tokens(rows: Sequence[Row], lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[i] for i in row) for row in rows]


def _divide(rows: list[Row], lengths: Sequence[int], parts: int) -> list[list[Row]]:
    """Rows of like length together, in `parts` micro-batches of about the same number."""
    ordered = sorted(rows, key=lambda row: sum(lengths[i] for i in row))
    cuts = [len(rows) * part // parts for part in range(parts + 1)]
    return [ordered[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False)]


def _duration(division: list[list[Row]], lengths: Sequence[int], ranks: int) -> int:
    """Tokens, padding included, that the slowest rank of every round puts through the model."""
    sizes = [len(rows) * max(_tokens(rows, lengths), default=0) for rows in division]
    return sum(max(sizes[start : start + ranks]) for start in range(0, len(sizes), ranks))

"""Global batches: order over epochs, micro-batches per rank, padding."""

import bisect
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.runtime.distributed import gather_objects
from common.runtime.option_checks import rows_per_micro_batch
from common.runtime.options import OptimiserOptions, TrainOptions
from common.runtime.row_groups import data_rank, data_ranks

# Batches per window that is sorted by length: more batches mean less padding, fewer are closer to a plain
# shuffle.
BATCHES_PER_WINDOW = 16

Shape = tuple[int, int]  # rows of an example, and tokens of the longest


def batch_order(
    lengths: Sequence[int], batch_size: int, seed: int, start: int, grouped: bool
) -> Iterator[list[int]]:
    """Yield global batches of example indices without end, from batch number `start` on. Deterministic.

    Each epoch has its own order. A batch may cross epochs, so no example is dropped and no batch is short.
    grouped: sort each window of batches by length, then shuffle its batches.
    """
    size, number = len(lengths), start
    while True:
        epoch = number * batch_size // size
        # Only batches inside one epoch are grouped by length.
        first, end = math.ceil(epoch * size / batch_size), (epoch + 1) * size // batch_size
        if not grouped or number < first or number >= end:
            yield _epoch_stream(size, seed, number * batch_size, batch_size)
            number += 1
            continue
        begin = number - (number - first) % BATCHES_PER_WINDOW
        window = min(BATCHES_PER_WINDOW, end - begin)
        indices = _epoch_stream(size, seed, begin * batch_size, window * batch_size)
        indices.sort(key=lambda i: lengths[i])
        batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        np.random.default_rng((seed, 1, begin)).shuffle(batches)
        yield from batches[number - begin :]
        number = begin + window


def examples_of_steps(lengths: Sequence[int], batch_size: int, seed: int, steps: int) -> list[int]:
    """Sorted indices of the examples in the first `steps` batches, grouped by length."""
    if steps * batch_size >= len(lengths):
        return list(range(len(lengths)))
    return sorted(chain(*islice(batch_order(lengths, batch_size, seed, 0, grouped=True), steps)))


def indices_of_round(size: int, count: int, seed: int, number: int) -> list[int]:
    """Indices of the examples of round `number`, from 1, of `size` in all.

    Each round takes the next `count` of them in random order; 0, or as many as there are: all in their order.
    """
    if not 0 < count < size:
        return list(range(size))
    return next(batch_order(range(size), count, seed, number - 1, grouped=False))


class Tokens(int):
    """Size of micro-batches in tokens, padding included; a plain int is a size in rows."""


def micro_batch(options: Any, rows: int = 0) -> int | Tokens:
    """Size of micro-batches: --micro_batch_tokens if given, else `rows` or else --micro_batch_size."""
    if isinstance(options, OptimiserOptions):
        rows = rows or rows_per_micro_batch(options)
    return Tokens(options.micro_batch_tokens) or rows or options.micro_batch_size


def rows_of(size: int | Tokens, responses: int) -> int | Tokens:
    """Size of micro-batches of rows with so many responses each. size: of those with one response."""
    return size if isinstance(size, Tokens) else max(1, size // responses)


def deal(
    batch: Sequence[int], lengths: Sequence[int], size: int | Tokens, rank: int, ranks: int,
    shapes: Sequence[Shape] = (),
) -> list[list[int]]:  # fmt: skip
    """This rank's micro-batches of a global batch, with examples of similar length.

    All ranks have the same number of micro-batches; some are empty if the examples do not fill the last
    round, as in evaluation. shapes: of the examples, by index; default: one row of its length each.
    """
    ordered = sorted(batch, key=lambda i: lengths[i])
    if isinstance(size, Tokens):
        shapes = shapes or [(1, length) for length in lengths]
        parts = len(fill(ordered, shapes, size))
        return fill_evenly(ordered, shapes, size, math.ceil(parts / ranks) * ranks)[rank::ranks]
    rounds = math.ceil(len(ordered) / (size * ranks))
    starts = [(j * ranks + rank) * size for j in range(rounds)]
    return [ordered[s : s + size] for s in starts]


def fill(ordered: Sequence[int], shapes: Sequence[Shape], tokens: int) -> list[list[int]]:
    """Divide examples, in order, into the fewest micro-batches of up to `tokens` tokens, padding included.

    An example with more tokens is a micro-batch of its own.
    """
    parts: list[list[int]] = []
    rows = width = 0
    for i in ordered:
        rows, width = rows + shapes[i][0], max(width, shapes[i][1])
        if not parts or rows * width > tokens:
            parts.append([])
            rows, width = shapes[i]
        parts[-1].append(i)
    return parts


def fill_evenly(ordered: Sequence[int], shapes: Sequence[Shape], tokens: int, count: int) -> list[list[int]]:
    """Like `fill`, but `count` micro-batches, the largest as small as possible.

    count: at least as many as `fill` makes. Some are empty if there are fewer examples.
    """
    smallest = bisect.bisect_left(range(tokens), True, key=lambda n: len(fill(ordered, shapes, n)) <= count)
    parts = fill(ordered, shapes, smallest)
    while len(parts) < min(count, len(ordered)):
        longest = parts.index(max(parts, key=len))
        middle = len(parts[longest]) // 2
        parts[longest : longest + 1] = [parts[longest][:middle], parts[longest][middle:]]
    return parts + [[]] * (count - len(parts))


def batches_of_rank(
    lengths: Sequence[int], size: int | Tokens, shapes: Sequence[Shape] = ()
) -> list[tuple[list[int], bool]]:
    """This rank's micro-batches of examples of these lengths, and whether each is real.

    size, shapes: as in `deal`.
    """
    batches = deal(range(len(lengths)), lengths, size, data_rank(), data_ranks(), shapes)
    return with_dummies(batches, dummy=[0])


def batches_of_own(lengths: Sequence[int], size: int | Tokens) -> list[list[int]]:
    """Micro-batches of rows that this rank alone has, of these lengths. Every rank has as many rows.

    Every rank must call it, because all make as many micro-batches.
    """
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__)
    if isinstance(size, Tokens):
        shapes = [(1, length) for length in lengths]
        return fill_evenly(ordered, shapes, size, max(gather_objects(len(fill(ordered, shapes, size)))))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def with_dummies(batches: Sequence[list[Any]], dummy: list[Any]) -> list[tuple[list[Any], bool]]:
    """Put a dummy in the place of empty batches, and mark the others as real.

    ZeRO's collectives need a forward pass on all ranks, also on those that are left without rows.
    """
    return [(batch or dummy, bool(batch)) for batch in batches]


def steps_in_epochs(examples: int, batch_size: int, epochs: float) -> int:
    """Number of batches in `epochs` epochs; the last batch is filled up from the next epoch."""
    return math.ceil(examples * epochs / batch_size)


def padding_share(lengths: Sequence[int], options: TrainOptions, most_batches: int = 100) -> float:
    """Share of padding tokens in the first `most_batches` batches of an epoch."""
    real = padded = 0
    steps = min(most_batches, steps_in_epochs(len(lengths), options.global_batch_size, 1))
    for batch in islice(
        batch_order(lengths, options.global_batch_size, options.seed, 0, grouped=True), steps
    ):
        batch_lengths = [int(lengths[i]) for i in batch]
        for number in range(data_ranks()):
            for rows in deal(range(len(batch)), batch_lengths, micro_batch(options), number, data_ranks()):
                real += sum(batch_lengths[i] for i in rows)
                padded += len(rows) * max((batch_lengths[i] for i in rows), default=0)
    return 1 - real / padded


def pad_rows(rows: Sequence[Sequence[Any]], value: Any) -> Tensor:
    """Stack rows of different length to a tensor (B, T), padded on the right with `value`."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _epoch_stream(size: int, seed: int, first: int, count: int) -> list[int]:
    """`count` example indices from position `first` of all epochs' permutations in a row."""
    stream: list[int] = []
    for epoch in range(first // size, (first + count - 1) // size + 1):
        begin = max(first - epoch * size, 0)
        stream += _permutation(size, seed, epoch)[begin : first + count - epoch * size].tolist()
    return stream


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)

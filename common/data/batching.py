"""Global batches: their order over epochs, their micro-batches on each rank, and padding."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.runtime.options import TrainOptions, world_size

# Batches of like length are cut from this many batches at a time: enough to leave little padding, few enough
# to stay close to a plain shuffle.
BATCHES_PER_WINDOW = 16


def batch_order(
    lengths: Sequence[int], batch_size: int, seed: int, start: int, grouped: bool
) -> Iterator[list[int]]:
    """Endless global batches of example indices, from batch number `start` on: a pure function of its
    arguments.

    Epochs follow each other without a break, each in its own order, so that no example is ever dropped and no
    batch is short. With `grouped`, the batches of a window are formed by length, then shuffled.
    """
    size, number = len(lengths), start
    while True:
        epoch = number * batch_size // size
        # Batches that lie within one epoch are grouped; one that holds the turn of an epoch is taken as it
        # is.
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
    """Which examples the first steps use, in order of their numbers; batches are grouped by length."""
    if steps * batch_size >= len(lengths):
        return list(range(len(lengths)))
    return sorted(chain(*islice(batch_order(lengths, batch_size, seed, 0, grouped=True), steps)))


def deal(
    batch: Sequence[int], lengths: Sequence[int], micro_batch: int, rank: int, ranks: int
) -> list[list[int]]:
    """This rank's micro-batches of a global batch: rows of like length together, the same number on every
    rank.

    When the rows do not fill the last round (as in evaluation), some of the lists are empty.
    """
    ordered = sorted(batch, key=lambda i: lengths[i])
    rounds = math.ceil(len(ordered) / (micro_batch * ranks))
    starts = [(j * ranks + rank) * micro_batch for j in range(rounds)]
    return [ordered[s : s + micro_batch] for s in starts]


def steps_in_epochs(examples: int, batch_size: int, epochs: float) -> int:
    """Batches that show every example `epochs` times; the last one reaches into the next epoch to be full."""
    return math.ceil(examples * epochs / batch_size)


def padding_share(lengths: Sequence[int], options: TrainOptions, most_batches: int = 100) -> float:
    """Share of padding in the micro-batches of an epoch of rows of these lengths, or of its first batches."""
    real = padded = 0
    steps = min(most_batches, steps_in_epochs(len(lengths), options.global_batch_size, 1))
    for batch in islice(
        batch_order(lengths, options.global_batch_size, options.seed, 0, grouped=True), steps
    ):
        in_batch = [int(lengths[i]) for i in batch]
        for rank in range(world_size()):
            for rows in deal(range(len(batch)), in_batch, options.micro_batch_size, rank, world_size()):
                real += sum(in_batch[i] for i in rows)
                padded += len(rows) * max((in_batch[i] for i in rows), default=0)
    return 1 - real / padded


def pad_rows(rows: Sequence[Sequence[Any]], value: Any) -> Tensor:
    """Rows of unlike length as one tensor (B, T), padded on the right with `value`."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _epoch_stream(size: int, seed: int, first: int, count: int) -> list[int]:
    """Entries first .. first + count of the endless concatenation of one permutation per epoch."""
    stream: list[int] = []
    for epoch in range(first // size, (first + count - 1) // size + 1):
        begin = max(first - epoch * size, 0)
        stream += _permutation(size, seed, epoch)[begin : first + count - epoch * size].tolist()
    return stream


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)

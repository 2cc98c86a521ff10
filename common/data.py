"""Records to tokenised examples, the held-out part, and the order in which examples are seen."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.distributed import log
from common.formatting import Message, find_prompt
from common.options import DataOptions, RunOptions, UserError
from common.records import Record, fraction, parse_record, read_records

Example = TypeVar("Example")

# Batches of like length are cut from this many batches at a time: enough to leave little padding, few enough
# to stay close to a plain shuffle.
BATCHES_PER_WINDOW = 16


class Examples(list[Example]):
    """Examples, and where the record of each stands, as `file:line`, for messages."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: list[str] = []

    def add(self, example: Example, origin: str) -> None:
        self.append(example)
        self.origins.append(origin)


def load_examples(
    sources: Sequence[str], options: DataOptions, convert: Callable[[Record], Example | None]
) -> tuple[Examples[Example], list[Example]]:
    """Training and held-out examples, tokenised by `convert`.

    convert: record -> example, or None for a record that has nothing to train on; it raises ValueError for a
    bad one. Without --eval_data, records are held out by a hash of their prompt, so that a prompt is never on
    both sides; in the same way --data_split gives each stage its part of the prompts. Raises UserError naming
    file and line for a bad record (unless --skip_bad_records), and when no rows are left.
    """
    train, held_out = Examples(), []
    begin, end = _stage_share(options)
    for origin, prompt, example in _convert_all(sources, options, convert):
        if options.data_split and not begin <= fraction(prompt, "stage") < end:
            continue
        if not options.eval_data and fraction(prompt, "") < options.eval_fraction:
            held_out.append(example)
        else:
            train.add(example, origin)
    if options.eval_data:
        held_out = [example for _, _, example in _convert_all(options.eval_data, options, convert)]
    if not train:
        raise UserError(f"{' '.join(sources)}: no rows left to train on")
    if options.max_eval_samples:
        held_out = held_out[: options.max_eval_samples]
    return train, held_out


def check_best_metric(options: RunOptions, held_out: Sequence[Example], *measured: str) -> None:
    """Raise UserError unless the stage measures --best_metric, and has held-out data to measure it on."""
    if options.best_metric not in ("none", *measured):
        raise UserError(
            f"--best_metric {options.best_metric}: here it must be none or {' or '.join(measured)}"
        )
    if options.best_metric != "none" and not held_out:
        raise UserError(
            f"--best_metric {options.best_metric}: needs held-out data: --eval_data or --eval_fraction"
        )


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


def pad_rows(rows: Sequence[Sequence[Any]], value: Any) -> Tensor:
    """Rows of unlike length as one tensor (B, T), padded on the right with `value`."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _convert_all(
    sources: Sequence[str], options: DataOptions, convert: Callable[[Record], Example | None]
) -> Iterator[tuple[str, str | list[Message], Example]]:
    """Every good record's origin, prompt and example, as often as its source's weight says."""
    bad = dropped = 0
    for source, origin, unparsed in read_records(sources):
        try:
            record = parse_record(unparsed)
            example, prompt = convert(record), find_prompt(record)
        except ValueError as error:
            if not options.skip_bad_records:
                raise UserError(f"{origin}: {error}") from None
            bad += 1
            continue
        if example is None:
            dropped += 1
            continue
        copies, rest = divmod(source.weight, 1)
        for _ in range(int(copies) + bool(rest and fraction(prompt, "weight") < rest)):
            yield origin, prompt, example
    if bad or dropped:
        log(
            f"{' '.join(sources)}: skipped {bad} bad records,"
            f" dropped {dropped} with no response left after truncation"
        )


def _stage_share(options: DataOptions) -> tuple[float, float]:
    """Where in [0, 1) the records of this stage lie, by --data_split."""
    if not options.data_split:
        return 0.0, 1.0
    try:
        parts = [float(part) for part in options.data_split.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or min(parts) < 0 or not 0 < parts[options.stage - 1] < math.inf:
        raise UserError(
            f"--data_split {options.data_split}: must be three numbers, the parts of steps 1, 2 and 3,"
            f" as in 2,4,4, and step {options.stage} needs one above 0"
        )
    before = sum(parts[: options.stage - 1])
    return before / sum(parts), (before + parts[options.stage - 1]) / sum(parts)


def _epoch_stream(size: int, seed: int, first: int, count: int) -> list[int]:
    """Entries first .. first + count of the endless concatenation of one permutation per epoch."""
    stream: list[int] = []
    for epoch in range(first // size, (first + count - 1) // size + 1):
        stream += np.random.default_rng((seed, 0, epoch)).permutation(size).tolist()
    return stream[first % size :][:count]

"""Records to tokenised examples, the held-out part, and the order in which examples are seen."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.data_report import describe_data, warn_of_few, why_empty
from common.distributed import log
from common.options import DataOptions, RunOptions, TrainOptions, UserError, world_size
from common.prepare import Convert, Prepared, prepare
from common.rendering_report import Rendered, describe_rendering, rendered
from common.sources import copies, files_to_read, parse_source
from common.table import Row

# Batches of like length are cut from this many batches at a time: enough to leave little padding, few enough
# to stay close to a plain shuffle.
BATCHES_PER_WINDOW = 16
LEARNT = {"is_trained", "is_response"}  # fields of rows in which every reply is learnt


class Examples(Sequence[Row]):
    """Rows of prepared sources, in an order of their own, read from disk one by one."""

    def __init__(self, sources: Sequence[Prepared], source: np.ndarray, row: np.ndarray) -> None:
        """source, row: for each example the number of its source, and of its row there, (N,) each."""
        self._sources, self._source, self._row = sources, source, row

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Row:
        return self._sources[self._source[index]].rows[self._row[index]]

    def origin(self, index: int) -> str:
        """Where the record of an example stands, for messages."""
        return self._sources[self._source[index]].origin(self._row[index])

    def notes(self, name: str) -> np.ndarray:
        """A field of `prepare.Note` of every example, (N,)."""
        return self._gather([source.notes.column(name) for source in self._sources])

    def column(self, name: str) -> np.ndarray:
        """A field of every row that is a single number, (N,)."""
        return self._gather([source.rows.column(name) for source in self._sources])

    def _gather(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        found = np.empty(len(self), columns[0].dtype)
        for number, column in enumerate(columns):
            found[self._source == number] = column[self._row[self._source == number]]
        return found

    def distinct_rows(self) -> int:
        """How many rows there are, however often a weight has each of them seen."""
        return len(np.unique(np.stack([self._source, self._row]), axis=1).T)

    def rendered(self) -> Iterator[Rendered]:
        """By source, how the prompts of these examples became text."""
        for number, source in enumerate(self._sources):
            yield from rendered(source, self._row[self._source == number])

    @property
    def digest(self) -> str:
        """What tells these examples, in this order, from any others."""
        content = hashlib.sha256(" ".join(source.key for source in self._sources).encode())
        content.update(self._source.tobytes())
        content.update(self._row.tobytes())
        return content.hexdigest()

    def take(self, chosen: np.ndarray | slice) -> "Examples[Row]":
        """Examples by a mask, a slice or their numbers."""
        return Examples(self._sources, self._source[chosen], self._row[chosen])


def load_examples(
    sources: Sequence[str], options: DataOptions, row_class: type[Row], convert: Convert,
    is_training: bool = True,
) -> tuple[Examples[Row], list[Row]]:  # fmt: skip
    """Training and held-out examples, tokenised by `convert` (see `prepare`), with a table of what was found.

    is_training: see `files_of`. Without --eval_data, records are held out by a hash of their prompt, so that
    a prompt is never on both sides; in the same way --data_split gives each stage its part of the prompts.
    Raises UserError naming file and line for a bad record (unless --skip_bad_records), and when no rows are
    left.
    """
    begin, end = _stage_share(options)
    read, prepared = _load(sources, options, row_class, convert, is_training)
    ours = read.take((read.notes("stage") >= begin) & (read.notes("stage") < end))
    if options.eval_data:
        train = ours
        held_out, prepared_too = _load(options.eval_data, options, row_class, convert, is_training=False)
    else:
        is_held_out = ours.notes("held_out") < options.eval_fraction
        train, held_out, prepared_too = ours.take(~is_held_out), ours.take(is_held_out), []
    if not len(train):
        elsewhere = {
            "held out by --eval_fraction": 0 if options.eval_data else ours.distinct_rows(),
            "in the parts of other steps by --data_split": read.distinct_rows() - ours.distinct_rows(),
        }
        raise UserError(f"{' '.join(sources)}: no rows left: {why_empty(prepared, elsewhere)}")
    describe_data(prepared + prepared_too, train, held_out)
    if encoder := getattr(convert, "keywords", {}).get("encoder"):
        used = [*ours.rendered(), *(held_out.rendered() if options.eval_data else [])]
        describe_rendering(used, encoder, learns_replies=bool(LEARNT & {*row_class._fields}))
    if options.eval_data or options.eval_fraction:
        warn_of_few(held_out.notes("held_out")[: options.max_eval_samples or None].tolist())
    if isinstance(options, TrainOptions):
        log(f"{padding_share(train.notes('length'), options):.1%} padding in batches of like length")
    return train, list(held_out.take(slice(options.max_eval_samples or None)))


def check_best_metric(options: RunOptions, held_out: Sequence[Any]) -> None:
    """Raise UserError when no record is held out to measure --best_metric on."""
    if options.best_metric != "none" and not held_out:
        raise UserError(
            f"--best_metric {options.best_metric}: no record is held out: give --eval_data, or a larger"
            " --eval_fraction"
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


def _load(
    sources: Sequence[str], options: DataOptions, row_class: type[Row], convert: Convert, is_training: bool
) -> tuple[Examples[Row], list[Prepared]]:
    """Every row of the sources, as often as the source's weight says."""
    prepared: list[Prepared] = []
    rows = []
    for source in map(parse_source, sources):
        for name in files_to_read(source, is_training):
            prepared.append(prepare(name, options, row_class, convert))
            repeats = copies(source.weight, prepared[-1].notes.column("weight"))
            rows.append(np.repeat(np.arange(len(repeats)), repeats))
    numbers = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    return Examples(prepared, numbers, np.concatenate(rows)), prepared


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
        begin = max(first - epoch * size, 0)
        stream += _permutation(size, seed, epoch)[begin : first + count - epoch * size].tolist()
    return stream


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)

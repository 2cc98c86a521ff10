"""Rows of numbers, text and lists of numbers in memory-mapped Arrow files: only rows in use need memory."""

import contextlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar, get_type_hints

import numpy as np
import pyarrow as pa  # a dependency of `datasets`

Row = TypeVar("Row", bound=tuple)

# Allowed types of fields, and their types in the file.
TYPES = {
    bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string(),
    list[bool]: pa.list_(pa.bool_()), list[int]: pa.list_(pa.int32()), list[float]: pa.list_(pa.float64()),
}  # fmt: skip


class Table(Generic[Row]):
    """Read-only sequence of named tuples, written by `table_writer`."""

    def __init__(self, file: Path, row_class: type[Row]) -> None:
        self._row_class = row_class
        self._table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self._batches = self._table.to_batches()
        self._ends = [*accumulate(map(len, self._batches))]

    def __getitem__(self, row: int) -> Row:
        # `Table.slice` would visit all batches: milliseconds per row in a large file.
        number = bisect_right(self._ends, row)
        batch = self._batches[number]
        return self._row_class(**batch.slice(row - self._ends[number] + len(batch), 1).to_pylist()[0])

    def column(self, name: str) -> np.ndarray:
        """All values of a number field, (N,)."""
        return self._table.column(name).to_numpy()


@contextlib.contextmanager
def table_writer(file: Path, row_class: type[Row]) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """Write batches made by `to_batch` to a new file, without holding earlier ones in memory."""
    with file.open("wb") as sink:
        with pa.ipc.new_file(sink, _schema(row_class)) as writer:
            yield writer
        sink.flush()
        os.fsync(sink.fileno())


def to_batch(rows: Sequence[Row], row_class: type[Row]) -> pa.RecordBatch:
    """Convert rows to columns."""
    return pa.RecordBatch.from_pylist([row._asdict() for row in rows], schema=_schema(row_class))


def _schema(row_class: type[Row]) -> pa.Schema:
    return pa.schema([(name, TYPES[kind]) for name, kind in get_type_hints(row_class).items()])

"""Rows of numbers, text and lists of numbers in memory-mapped columns: a million cost no more memory than
what is read of them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, get_type_hints

import numpy as np

Row = TypeVar("Row", bound=tuple)

# What the fields of a row may be, and how their values lie in a file.
DTYPES = {
    bool: np.bool_, int: np.int64, float: np.float64, str: np.uint8,
    list[bool]: np.bool_, list[int]: np.int32, list[float]: np.float64,
}  # fmt: skip
SCALARS = (bool, int, float)


class Table(Generic[Row]):
    """Rows of one class of named tuples, as `TableWriter` has written them to a folder."""

    def __init__(self, folder: Path, row_class: type[Row]) -> None:
        self._row_class = row_class
        self._kinds = get_type_hints(row_class)
        self._values = {
            name: _mapped(folder / f"{name}.values", DTYPES[kind]) for name, kind in self._kinds.items()
        }
        self._ends = {
            name: _mapped(folder / f"{name}.ends", np.int64)
            for name, kind in self._kinds.items()
            if kind not in SCALARS
        }

    def __getitem__(self, row: int) -> Row:
        return self._row_class(*(self._field(name, kind, row) for name, kind in self._kinds.items()))

    def column(self, name: str) -> np.ndarray:
        """All values of a field that is a single number, (N,)."""
        return self._values[name]

    def _field(self, name: str, kind: Any, row: int) -> Any:
        if kind in SCALARS:
            return self._values[name][row].item()
        ends = self._ends[name]
        part = self._values[name][ends[row - 1] if row else 0 : ends[row]]
        return part.tobytes().decode() if kind is str else part.tolist()


class TableWriter(Generic[Row]):
    """Appends rows to the columns of a folder; only what is appended at once is in memory."""

    def __init__(self, folder: Path, row_class: type[Row]) -> None:
        self._files: dict[str, BinaryIO] = {}
        self._ends: dict[str, int] = {}
        for name, kind in get_type_hints(row_class).items():
            self._files[f"{name}.values"] = (folder / f"{name}.values").open("wb")
            if kind not in SCALARS:
                self._files[f"{name}.ends"] = (folder / f"{name}.ends").open("wb")
                self._ends[name] = 0

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Columns as `to_columns` makes them."""
        for name, values in columns.items():
            column, _, part = name.rpartition(".")
            if part == "ends" and len(values):
                values = values + self._ends[column]
                self._ends[column] = int(values[-1])
            self._files[name].write(values.tobytes())

    def close(self) -> None:
        """Flush all to disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


def to_columns(rows: Sequence[Row], row_class: type[Row]) -> dict[str, np.ndarray]:
    """The values of each field, one row after the other, and where each row's end, if they are several."""
    columns = {}
    for place, (name, kind) in enumerate(get_type_hints(row_class).items()):
        fields = [row[place] for row in rows]
        if kind is str:
            fields = [np.frombuffer(text.encode(), np.uint8) for text in fields]
        if kind not in SCALARS:
            columns[f"{name}.ends"] = np.cumsum([len(field) for field in fields], dtype=np.int64)
            fields = _joined(fields)
        columns[f"{name}.values"] = np.asarray(fields, dtype=DTYPES[kind])
    return columns


def _joined(fields: Iterable[Sequence[Any]]) -> list[Any]:
    return [value for field in fields for value in field]


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    """A file as an array; one of no bytes cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

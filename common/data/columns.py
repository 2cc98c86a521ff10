"""Rows of numbers, text and lists of numbers, in memory-mapped columns: only rows in use need memory."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, get_type_hints

import numpy as np

Row = TypeVar("Row", bound=tuple)

# Allowed types of fields, and the dtype of their files.
DTYPES = {
    bool: np.bool_, int: np.int64, float: np.float64, str: np.uint8,
    list[bool]: np.bool_, list[int]: np.int32, list[float]: np.float64,
}  # fmt: skip
SCALARS = (bool, int, float)


class Table(Generic[Row]):
    """Read-only sequence of named tuples, written by `TableWriter`."""

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
        """All values of a number field, (N,)."""
        return self._values[name]

    def _field(self, name: str, kind: Any, row: int) -> Any:
        if kind in SCALARS:
            return self._values[name][row].item()
        ends = self._ends[name]
        part = self._values[name][ends[row - 1] if row else 0 : ends[row]]
        return part.tobytes().decode() if kind is str else part.tolist()


class TableWriter(Generic[Row]):
    """Appends rows to the columns of a folder, without holding earlier rows in memory."""

    def __init__(self, folder: Path, row_class: type[Row]) -> None:
        self._files: dict[str, BinaryIO] = {}
        self._ends: dict[str, int] = {}
        for name, kind in get_type_hints(row_class).items():
            self._files[f"{name}.values"] = (folder / f"{name}.values").open("wb")
            if kind not in SCALARS:
                self._files[f"{name}.ends"] = (folder / f"{name}.ends").open("wb")
                self._ends[name] = 0

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Append columns made by `to_columns`."""
        for name, values in columns.items():
            column, _, part = name.rpartition(".")
            if part == "ends" and len(values):
                values = values + self._ends[column]
                self._ends[column] = int(values[-1])
            self._files[name].write(values.tobytes())

    def close(self) -> None:
        """Flush all files to disk and close them."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


def to_columns(rows: Sequence[Row], row_class: type[Row]) -> dict[str, np.ndarray]:
    """Concatenate the values of each field; for lists and text, also the end index of each row."""
    columns = {}
    for index, (name, kind) in enumerate(get_type_hints(row_class).items()):
        fields = [row[index] for row in rows]
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
    """Memory-map a file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

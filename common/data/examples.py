"""Tokenised examples of several prepared sources, read from disk one at a time."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from common.data.cache import Prepared
from common.data.columns import Row
from common.data.rendering_report import Rendered, rendered


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

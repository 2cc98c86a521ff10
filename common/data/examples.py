"""Examples from several tokenised sources."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from common.data.cache import Prepared
from common.data.columns import Row
from common.data.rendering_report import Rendered, rendered


class Examples(Sequence[Row]):
    """Sequence of rows of prepared sources, in any order, read from disk on access."""

    def __init__(self, sources: Sequence[Prepared], source: np.ndarray, row: np.ndarray) -> None:
        """source, row: index of each example's source, and of its row in that source, (N,) each."""
        self._sources, self._source, self._row = sources, source, row

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Row:
        return self._sources[self._source[index]].rows[self._row[index]]

    def origin(self, index: int) -> str:
        """File and line of an example's record, for messages."""
        return self._sources[self._source[index]].origin(self._row[index])

    def notes(self, name: str) -> np.ndarray:
        """A field of `cache.Note` for every example, (N,)."""
        return self._gather([source.notes.column(name) for source in self._sources])

    def column(self, name: str) -> np.ndarray:
        """A number field of every row, (N,)."""
        return self._gather([source.rows.column(name) for source in self._sources])

    def _gather(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        values = np.empty(len(self), columns[0].dtype)
        for number, column in enumerate(columns):
            values[self._source == number] = column[self._row[self._source == number]]
        return values

    def distinct_rows(self) -> int:
        """Number of rows, without repetitions by weights."""
        return len(np.unique(np.stack([self._source, self._row]), axis=1).T)

    def rendered(self) -> Iterator[Rendered]:
        """Yield how prompts were rendered, for each source."""
        for number, source in enumerate(self._sources):
            yield from rendered(source, self._row[self._source == number])

    @property
    def digest(self) -> str:
        """Hash of the content and order of these examples."""
        content = hashlib.sha256(" ".join(source.key for source in self._sources).encode())
        content.update(self._source.tobytes())
        content.update(self._row.tobytes())
        return content.hexdigest()

    def take(self, selection: np.ndarray | slice) -> "Examples[Row]":
        """Select examples by a mask, a slice or indices."""
        return Examples(self._sources, self._source[selection], self._row[selection])

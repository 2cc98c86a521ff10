"""Progress lines of long passes outside training: share done, rate, ETA."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from common.runtime.distributed import log

FIRST_LINE = 2.0  # seconds; a shorter pass logs nothing
NEXT_LINES = 10.0  # seconds between further lines
Batch = TypeVar("Batch")


class Progress:
    """Log the progress of a pass over `total` items: one line after 2 s, then one every 10 s.

    done: items finished by an earlier run; rate and ETA do not count them.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._first = title, total, done
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE
        self._is_shown = False

    def update(self, done: int, note: str = "") -> bool:
        """Set the number of finished items. Returns whether a line was due and logged, ending in `note`."""
        now = time.monotonic()
        is_end = done >= self._total and self._is_shown
        if (now < self._next and not is_end) or done <= self._first:
            return False
        self._next, self._is_shown = now + NEXT_LINES, True
        seconds = now - self._start
        rate = (done - self._first) / seconds
        left = self._total - done
        end = f"ETA {clock(left / rate)}" if left > 0 else f"took {clock(seconds)}"
        end += note and f" | {note}"
        log(f"{self._title}: {done}/{self._total} ({done / self._total:.0%}) | {rate:.3g}/s | {end}")
        return True


def track(title: str, batches: Sequence[Batch], total: int) -> Iterator[Batch]:
    """Yield this rank's batches and log the progress of the pass. Logs nothing without a title.

    total: items of all ranks. Every rank has the same number of batches, see `common.data.batching.deal`.
    """
    if not title:
        yield from batches
        return
    progress = Progress(title, total)
    for number, batch in enumerate(batches, start=1):
        yield batch
        progress.update(total * number // len(batches))


class ReadingProgress:
    """Log the progress of reading records whose total number is unknown."""

    def __init__(self, title: str, log: Callable[[str], None] = log) -> None:
        self._title, self._log, self._start = title, log, time.monotonic()
        self._next = self._start + FIRST_LINE

    def update(self, count: int, share: float) -> None:
        """Set the number of records read and the share (above 0) of the file that they take."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next, seconds = now + NEXT_LINES, now - self._start
        left = clock(seconds * (1 / share - 1))
        self._log(f"{self._title}: {count} records ({share:.0%}) | {count / seconds:.3g}/s | ETA {left}")


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss, such as 0:03:25."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

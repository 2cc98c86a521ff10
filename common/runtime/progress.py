"""Progress lines of long passes outside training: how far, how fast, how long still."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from common.runtime.distributed import log

FIRST_LINE = 2.0  # seconds; a pass that takes less stays silent
NEXT_LINES = 10.0  # seconds between further lines
Batch = TypeVar("Batch")


class Progress:
    """Log the progress of a pass over `total` items: a first line after two seconds, then one every ten.

    done: items that an earlier run has finished; rate and ETA are of the others.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._first = title, total, done
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE
        self._is_shown = False

    def update(self, done: int, note: str = "") -> bool:
        """Count `done` items as finished; true when a line was due and was logged, with a note at its end."""
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
    """Yield this rank's batches of a pass over `total` items of all ranks, and log its progress.

    Every rank has as many batches, see `common.data.batching.deal`. Without a title nothing is logged.
    """
    if not title:
        yield from batches
        return
    progress = Progress(title, total)
    for number, batch in enumerate(batches, start=1):
        yield batch
        progress.update(total * number // len(batches))


class ReadingProgress:
    """The same for records that are read, of which only the share is known that is done."""

    def __init__(self, title: str, log: Callable[[str], None] = log) -> None:
        self._title, self._log, self._start = title, log, time.monotonic()
        self._next = self._start + FIRST_LINE

    def update(self, count: int, share: float) -> None:
        """Count the records and the share, above 0, of the file that are done."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next, seconds = now + NEXT_LINES, now - self._start
        left = clock(seconds * (1 / share - 1))
        self._log(f"{self._title}: {count} records ({share:.0%}) | {count / seconds:.3g}/s | ETA {left}")


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 0:03:25."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

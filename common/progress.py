"""Progress lines of long passes outside training: how far, how fast, how long still."""

import time

from common.distributed import log

FIRST_LINE = 2.0  # seconds; a pass that takes less stays silent
NEXT_LINES = 10.0  # seconds between further lines


class Progress:
    """Log the progress of a pass over `total` items: a first line after two seconds, then one every ten.

    done: items that an earlier run has finished; rate and ETA are of the others.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._first = title, total, done
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE

    def update(self, done: int) -> bool:
        """Count `done` items as finished; true when a line was due and was logged."""
        now = time.monotonic()
        if now < self._next or done <= self._first:
            return False
        self._next = now + NEXT_LINES
        rate = (done - self._first) / (now - self._start)
        log(
            f"{self._title}: {done}/{self._total} ({done / self._total:.0%}) | {rate:.3g}/s"
            f" | ETA {clock((self._total - done) / rate)}"
        )
        return True


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 0:03:25."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

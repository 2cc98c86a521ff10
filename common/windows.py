"""Long work on many items that goes on where it was stopped: some of them after the others, and what becomes
of these is on disk, whole, before the next.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.distributed import gather_objects, log, rank
from common.process import Stopped, stop_requested
from common.records import Record

REPORT_SECONDS = 10.0


def work_through(
    items: Sequence[Any], work: Callable[[Mapping[int, Any]], list[Any]], journal: Path, size: int
) -> list[Any]:
    """What becomes of all items, on rank 0, also when it was found by an earlier run; every rank must call.

    work: from `size` items by their numbers to something in JSON for each, the same on every rank. journal:
    a file in the run's folder that holds what is done, a line for each call of `work`. Raises Stopped between
    two of them when that was asked for.
    """
    found = _take_up(journal) if rank() == 0 else []
    done, shown = gather_objects(len(found))[0], 0.0
    while done < len(items):
        if time.monotonic() - shown > REPORT_SECONDS:
            log(f"{done} of {len(items)} done")
            shown = time.monotonic()
        stop_if_asked(journal.parent)
        made = work(dict(enumerate(items[done : done + size], start=done)))
        if rank() == 0:
            _append(journal, made)
            found += made
        done += len(made)
    return found


def stop_if_asked(output_dir: Path | str) -> None:
    """Raises Stopped, on all ranks, which must ask together."""
    if stop_requested(str(output_dir)):
        raise Stopped("stopped, as asked; the same command goes on after the last batch that was finished")


def to_lines(records: Sequence[Record]) -> str:
    """Records as JSONL."""
    return "".join(f"{json.dumps(record)}\n" for record in records)


def _take_up(journal: Path) -> list[Any]:
    """What is in the journal; a last line that was not finished is removed."""
    with journal.open("a+b") as file:
        file.seek(0)
        lines = file.read()
        file.truncate(lines.rfind(b"\n") + 1)
    return [one for line in lines.split(b"\n")[:-1] for one in json.loads(line)]


def _append(journal: Path, made: list[Any]) -> None:
    """Returns when the disk holds it."""
    with journal.open("a") as file:
        file.write(f"{json.dumps(made)}\n")
        file.flush()
        os.fsync(file.fileno())

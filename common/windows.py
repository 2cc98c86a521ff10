"""Long work on many items that goes on where it was stopped: a window of items after the other, each with a
file of its own that is whole or absent.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.distributed import gather_objects, log, rank
from common.files import write_text
from common.process import Stopped, stop_requested
from common.records import Record

WINDOW = 256  # items that are worked on together, on any number of ranks: the same batches, the same bytes


def work_through(
    items: Sequence[Any], work: Callable[[int, Sequence[Any]], list[Record]], folder: Path
) -> list[Record]:
    """What becomes of all items, on rank 0, also when it was found by an earlier run; every rank must call.

    work: from a window's number and items to records, the same ones on every rank. folder: claimed by
    `prepare_output`; its parts/ holds what is done. Raises Stopped after a window when that was asked for.
    """
    starts = range(0, len(items), WINDOW)
    parts = [folder / f"parts/{number:06d}.jsonl" for number in range(len(starts))]
    if rank() == 0:
        (folder / "parts").mkdir(exist_ok=True)
    done = gather_objects([part.exists() for part in parts])[0]
    for number, (start, part) in enumerate(zip(starts, parts, strict=True)):
        if done[number]:
            continue
        if stop_requested(str(folder)):
            raise Stopped(f"stopped after {start} of {len(items)}; the same command goes on from here")
        records = work(number, items[start : start + WINDOW])
        if rank() == 0:
            write_text(part, to_lines(records))
        log(f"{min(start + WINDOW, len(items))} of {len(items)} done")
    return [json.loads(line) for part in parts for line in part.open()] if rank() == 0 else []


def to_lines(records: Sequence[Record]) -> str:
    """Records as JSONL."""
    return "".join(f"{json.dumps(record)}\n" for record in records)

"""Resumable batch processing: results are appended to a journal before the next batch starts."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.runtime.distributed import log, on_first_rank, rank
from common.runtime.files import append_text
from common.runtime.options import UserError
from common.runtime.process import Stopped, stop_anywhere, stop_between_steps, stop_requested
from common.runtime.progress import Progress
from common.text.record_formats import Record


def work_through(
    items: Sequence[Any], work: Callable[[Mapping[int, Any]], list[Any]], journal: Path, size: int, noun: str
) -> list[Any]:
    """Process all items and return their results on rank 0, results of earlier runs included. A collective.

    work: converts up to `size` items, by index, to one JSON result each, the same on all ranks. journal: file
    in the run's folder with one line of results per call of `work`. noun: name of the items in messages.
    A stop raises Stopped at once until all items are done; after that it waits.
    """
    results, total = [], len(items)
    done = on_first_rank(_read_journal, journal, results)
    if done:
        log(f"resuming: {done} of {total} {noun} done")
    progress = Progress(noun, total, done)
    while done < total:
        stop_resumably(f"{done} of {total} {noun} done", journal.parent)
        batch = work(dict(enumerate(items[done : done + size], start=done)))
        if rank() == 0:
            append_text(journal, f"{json.dumps(batch)}\n")
            results += batch
        done += len(batch)
        progress.update(done)
    stop_between_steps()  # rank 0 writes the results, the others wait for it
    return results


def stop_resumably(done: str, output_dir: Path | str) -> None:
    """From now on, a stop ends this rank immediately: all results are on disk. A collective.

    Raises Stopped if a stop was already requested.
    """
    line = f"Stopped; {done}, saved in {output_dir}. Run the same command to resume."
    stop_anywhere(line)
    if stop_requested(str(output_dir)):
        raise Stopped(line)


def to_lines(records: Iterable[Record]) -> str:
    """Format records as JSON Lines."""
    return "".join(f"{json.dumps(record)}\n" for record in records)


def _read_journal(journal: Path, results: list[Any]) -> int:
    """Read and count the results; removes an unfinished last line. Raises UserError for a damaged line."""
    with journal.open("a+b") as file:
        file.seek(0)
        lines = file.read()
        file.truncate(lines.rfind(b"\n") + 1)
    for number, line in enumerate(lines.split(b"\n")[:-1], start=1):
        try:
            results += _parsed(line)
        except (ValueError, RecursionError):
            raise UserError(
                f"{journal}:{number}: damaged; restore the line, or delete the file to start again"
            ) from None
    return len(results)


def _parsed(line: bytes) -> list[Any]:
    results = json.loads(line)
    if not isinstance(results, list):
        raise ValueError(line)
    return results

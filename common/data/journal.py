"""Resumable batch processing: results are appended to a journal before the next batch starts."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.runtime.distributed import gather_objects, log, rank
from common.runtime.options import UserError
from common.runtime.process import Stopped, stop_anywhere, stop_between_steps, stop_requested
from common.runtime.progress import Progress
from common.text.record_formats import Record


def work_through(
    items: Sequence[Any], work: Callable[[Mapping[int, Any]], list[Any]], journal: Path, size: int, noun: str
) -> list[Any]:
    """The results of all items, on rank 0, those of an earlier run included; every rank must call.

    work: turns `size` items, by their numbers, into one result each, in JSON, the same on every rank.
    journal: a file in the run's folder with the results so far, a line for each call of `work`. noun: of the
    items, in messages. Raises Stopped, wherever it is, when that was asked for; once all items are done, a
    stop waits.
    """
    results, problem, total = [], "", len(items)
    if rank() == 0:
        try:
            results = _take_up(journal)
        except (UserError, OSError) as error:
            problem = str(error)
    done, problem = gather_objects((len(results), problem))[0]
    if problem:
        raise UserError(problem)
    if done:
        log(f"resuming: {done} of {total} {noun} done")
    progress = Progress(noun, total, done)
    while done < total:
        stop_resumably(f"{done} of {total} {noun} done", journal.parent)
        made = work(dict(enumerate(items[done : done + size], start=done)))
        if rank() == 0:
            _append(journal, made)
            results += made
        done += len(made)
        progress.update(done)
    stop_between_steps()  # rank 0 writes the results, the others wait for it
    return results


def stop_resumably(done: str, output_dir: Path | str) -> None:
    """From here on a stop ends this rank wherever it is: what is done is on disk. All ranks must call it.

    Raises Stopped when a stop was asked for already.
    """
    line = f"Stopped; {done}, saved in {output_dir}. Run the same command to resume."
    stop_anywhere(line)
    if stop_requested(str(output_dir)):
        raise Stopped(line)


def to_lines(records: Sequence[Record]) -> str:
    """Records as JSONL."""
    return "".join(f"{json.dumps(record)}\n" for record in records)


def _take_up(journal: Path) -> list[Any]:
    """The results in the journal; an unfinished last line is removed. Raises UserError for a damaged one."""
    with journal.open("a+b") as file:
        file.seek(0)
        lines = file.read()
        file.truncate(lines.rfind(b"\n") + 1)
    results = []
    for number, line in enumerate(lines.split(b"\n")[:-1], start=1):
        try:
            results += _parsed(line)
        except (ValueError, RecursionError):
            raise UserError(
                f"{journal}:{number}: damaged; restore the line, or delete the file to begin again"
            ) from None
    return results


def _parsed(line: bytes) -> list[Any]:
    made = json.loads(line)
    if not isinstance(made, list):
        raise ValueError(line)
    return made


def _append(journal: Path, made: list[Any]) -> None:
    """Returns when the disk holds it."""
    with journal.open("a") as file:
        file.write(f"{json.dumps(made)}\n")
        file.flush()
        os.fsync(file.fileno())

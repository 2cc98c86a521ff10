"""Token cache: tokenise a data source in parallel, once, into memory-mapped files for all later runs.

The name of a cache folder is a hash of the data, the tokenizer, the converting code and its settings. The
folder is renamed into place when it is complete; a lock makes other processes wait.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from common.data.columns import Row, Table, table_writer, to_batch
from common.data.readers import content_hash, origin, read_source
from common.data.records import BadRecords, fraction, parse_record
from common.data.sources import kind_of
from common.runtime.files import UMASK, flush_folder, locked, write_json
from common.runtime.options import CacheOptions, UserError, reason
from common.runtime.process import SIGNALS
from common.runtime.progress import ReadingProgress
from common.text.record_formats import Record
from common.text.segments import find_prompt
from common.text.truncation import Dropped

Convert = Callable[[Record], tuple[Row, bool]]  # record -> row, and whether it was truncated

CHUNK = 500  # records per task of a worker
FEW = 4  # with fewer chunks, no workers are started

# Folders whose code is part of the cache key, besides the file of `convert`.
CODE = (Path(__file__).parent, Path(__file__).parents[1] / "text")


class Note(NamedTuple):
    """Metadata of a row. The last four fields are hashes of its prompt or record, in [0, 1)."""

    number: int  # line of the file, or row of the dataset, from 1
    length: int  # tokens
    is_cut: bool  # truncated by --overlong
    is_string: bool  # the prompt is a string (used verbatim), not messages
    held_out: float  # of the prompt, for --eval_fraction
    stage: float  # of the prompt, for --data_split
    weight: float  # of the prompt, for the weight of the source
    record: float  # of the record: equal for duplicates


class Prepared(NamedTuple):
    """Tokenised rows of one source, and counts of the records left out."""

    name: str
    rows: Table
    notes: Table
    read: int  # records
    bad: int  # skipped by --skip_bad_records
    first_bad: tuple[int, str] | None  # record number and error of the first bad record
    dropped: dict[str, int]  # number of records by reason
    key: str  # cache key

    def origin(self, row: int) -> str:
        """File and line of a row's record, for messages."""
        return origin(self.name, self.notes[row].number)


def prepare(name: str, options: CacheOptions, row_class: type[Row], convert: Convert) -> Prepared:
    """Tokenise a file or hub dataset, or load its rows from the cache.

    convert: a `partial` of a module-level function; the cache key includes its keyword arguments. It raises
    ValueError for a bad record and Dropped for one that --overlong drops. Raises UserError with file and line
    of a bad record, unless --skip_bad_records.
    """
    cache = cache_folder(options)
    folder = cache / _key(name, options.skip_bad_records, row_class, convert)
    cores = len(os.sched_getaffinity(0))
    if options.preprocessing_workers > cores and not folder.exists():
        raise UserError(
            f"--preprocessing_workers {options.preprocessing_workers}: more than the cores of this machine;"
            f" allowed: 0 to {cores}"
        )
    waiting = f"{name}: waiting for another process that is tokenising it"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), waiting) as has_lock:
            if not has_lock:
                _wait_for_first_rank_here(folder)
            if not folder.exists():
                _build(folder, name, options, row_class, convert, has_lock)
    except OSError as error:
        raise UserError(f"--cache_dir {cache}: {error.strerror}") from None
    except BrokenProcessPool:
        raise UserError(
            f"{name}: a tokenising process was killed; if memory ran out, use fewer --preprocessing_workers"
        ) from None
    try:
        counts = json.loads((folder / "counts.json").read_text())
        tables = Table(folder / "rows.arrow", row_class), Table(folder / "notes.arrow", Note)
        return Prepared(name, *tables, **counts, key=folder.name)
    except Exception as error:  # noqa: BLE001 - the folder may hold anything
        raise UserError(f"{folder}: damaged token cache: {reason(error)}; delete the folder") from None


def cache_folder(options: CacheOptions) -> Path:
    """Folder of the token cache."""
    folder = options.cache_dir or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "triptych")
    return Path(folder).expanduser()


def _key(name: str, skip: bool, row_class: type, convert: Convert) -> str:
    function, settings = getattr(convert, "func", convert), getattr(convert, "keywords", {})
    code = [file for folder in CODE for file in sorted(folder.glob("*.py"))]
    code.append(Path(sys.modules[function.__module__].__file__))
    parts = [
        content_hash(name),
        kind_of(name),
        *(path.read_text() for path in code),
        f"{function.__qualname__} {row_class.__qualname__} {skip}",
        *(f"{key} {getattr(value, 'digest', value)!r}" for key, value in sorted(settings.items())),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _wait_for_first_rank_here(folder: Path) -> None:
    """Without locks, one rank per machine prepares: all of them would take all cores."""
    while os.environ.get("LOCAL_RANK", "0") != "0" and not folder.exists():
        time.sleep(0.5)


def _build(
    folder: Path, name: str, options: CacheOptions, row_class: type[Row], convert: Convert, has_lock: bool
) -> None:
    """Write the folder. Without a lock, other machines and runs may do the same: the first rename wins."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp*") if has_lock else ():
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp", dir=folder.parent))
    try:
        counts = _write(temporary, name, options, row_class, convert)
        write_json(temporary / "counts.json", counts)
        temporary.chmod(0o777 & ~UMASK)  # mkdtemp gives access to the owner only; a cache may be shared
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    folder: Path, name: str, options: CacheOptions, row_class: type[Row], convert: Convert
) -> dict[str, Any]:
    """Convert all records and write them to a new folder. Returns the counts of `Prepared`."""
    work = partial(
        _convert_chunk, name=name, skip=options.skip_bad_records, row_class=row_class, convert=convert
    )
    read = bad = 0
    dropped: Counter[str] = Counter()
    first_bad: tuple[int, str] | None = None
    progress = ReadingProgress(f"{name}: tokenising", partial(print, flush=True))  # on every rank
    with (
        table_writer(folder / "rows.arrow", row_class) as rows,
        table_writer(folder / "notes.arrow", Note) as notes,
    ):
        for (row_part, note_part), count, share in _results(
            read_source(name), options.preprocessing_workers, work
        ):
            rows.write(row_part)
            notes.write(note_part)
            read, bad = read + count["read"], bad + count["bad"]
            first_bad = first_bad or count["first_bad"]
            dropped.update(count["dropped"])
            progress.update(read, share)
    return {"read": read, "bad": bad, "first_bad": first_bad, "dropped": dict(dropped)}


def _results(records: Iterator[Any], workers: int, work: Callable[[Any], Any]) -> Iterator[Any]:
    """Apply `work` to chunks of records, in order; small sources use no worker processes."""
    chunks = iter(lambda: list(islice(records, CHUNK)), [])
    first = list(islice(chunks, FEW))
    workers = workers or len(os.sched_getaffinity(0))
    if len(first) < FEW or workers == 1:
        yield from map(work, chain(first, chunks))
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, initializer=_begin_worker, initargs=(work,)) as pool:
        ahead: deque[Future[Any]] = deque()
        for chunk in chain(first, chunks):
            ahead.append(pool.submit(_do_work, chunk))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _convert_chunk(
    chunk: list[tuple[int, float, Any]], name: str, skip: bool, row_class: type[Row], convert: Convert
) -> tuple[Any, dict[str, Any], float]:
    rows, notes = [], []
    bad, dropped = BadRecords(skip), Counter()
    for number, _, unparsed in chunk:
        with bad.at(name, number):
            record = parse_record(unparsed)
            try:
                row, is_cut = convert(record)
            except Dropped as why:
                dropped[str(why)] += 1
                continue
            prompt = find_prompt(record)
            fractions = (fraction(prompt, purpose) for purpose in ("", "stage", "weight"))
            notes.append(
                Note(number, row.length, is_cut, isinstance(prompt, str), *fractions, fraction(record, ""))
            )
            rows.append(row)
    count = {"read": len(chunk), "bad": bad.count, "first_bad": bad.first, "dropped": dropped}
    return (to_batch(rows, row_class), to_batch(notes, Note)), count, chunk[-1][1]


def _begin_worker(work: Callable[[Any], Any]) -> None:
    """Set up a worker: the parent handles signals, and the worker ends with its parent."""
    global _work
    _work = work
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _do_work(chunk: Any) -> Any:
    return _work(chunk)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

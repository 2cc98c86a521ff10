"""Token cache: keys, workers, concurrent and killed processes."""

import errno
import json
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest

from common.data import cache as module
from common.data.cache import prepare
from common.data.columns import Table, table_writer, to_batch
from common.runtime import files, progress
from common.runtime.options import DataOptions, UserError
from common.text.truncation import Dropped


class Everything(NamedTuple):
    """Row with a field of each type."""

    ids: list[int]
    mask: list[bool]
    weights: list[float]
    text: str
    number: int
    share: float
    flag: bool

    @property
    def length(self) -> int:
        return len(self.ids)


def everything(record: dict, times: int = 1) -> tuple[Everything, bool]:
    n = record["n"]
    if n == 7:
        raise Dropped("unlucky")
    if n < 0:
        raise ValueError("field 'n' is below 0")
    if n == 13 and os.environ.get("SLOW"):
        time.sleep(60)
    ids = list(range(n % 5)) * times
    return Everything(
        ids, [i % 2 == 0 for i in ids], [i / 3 for i in ids], "ä" * (n % 3), n, n / 7, n > 9
    ), n > 20


def write(path: Path, numbers: list[int]) -> str:
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "n": n}) + "\n" for n in numbers))
    return str(path)


def options(tmp_path: Path, **others) -> DataOptions:
    return DataOptions(cache_dir=str(tmp_path / "cache"), **others)


def folders(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_rows_round_trip(tmp_path):
    rows = [everything({"n": n})[0] for n in range(7)]
    with table_writer(tmp_path / "table", Everything) as writer:
        for part in (rows[:3], [], rows[3:]):
            writer.write(to_batch(part, Everything))
    table = Table(tmp_path / "table", Everything)
    assert [table[i] for i in range(7)] == rows
    assert table.column("number").tolist() == list(range(7))
    with pytest.raises(IndexError):
        table[7]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_do_not_depend_on_workers(tmp_path, workers):
    """Order of rows, their line numbers and the counts of records left out."""
    path = write(tmp_path / "data.jsonl", list(range(5000)))
    prepared = prepare(path, options(tmp_path, preprocessing_workers=workers), Everything, everything)
    numbers = [n for n in range(5000) if n != 7]
    assert [prepared.rows[i] for i in range(4999)] == [everything({"n": n})[0] for n in numbers]
    assert prepared.notes.column("number").tolist() == [n + 1 for n in numbers]
    assert prepared.notes.column("is_cut").tolist() == [n > 20 for n in numbers]
    assert prepared.origin(7) == f"{path}:9"
    assert (prepared.read, prepared.bad, prepared.dropped) == (5000, 0, {"unlucky": 1})
    assert len(np.unique(prepared.notes.column("record"))) == 4999


@pytest.mark.parametrize("workers", [1, 2])
def test_first_bad_record_is_named_and_leaves_no_files(tmp_path, workers):
    path = write(tmp_path / "data.jsonl", [*range(4000), -1, *range(100), -2])
    with pytest.raises(UserError, match=r"data\.jsonl:4001: field 'n' is below 0"):
        prepare(path, options(tmp_path, preprocessing_workers=workers), Everything, everything)
    assert folders(tmp_path) == []
    prepared = prepare(path, options(tmp_path, skip_bad_records=True), Everything, everything)
    assert prepared.bad == 2


def test_cache_is_rebuilt_only_when_an_input_changes(tmp_path, monkeypatch):
    calls = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *parts: (calls.append(1), build(*parts)))
    path, copy = (write(tmp_path / name, list(range(9))) for name in ("data.jsonl", "copy.jsonl"))
    first = prepare(path, options(tmp_path), Everything, everything)
    assert prepare(path, options(tmp_path), Everything, everything).rows[3] == first.rows[3]
    moved = prepare(copy, options(tmp_path, eval_fraction=0.5), Everything, partial(everything))
    assert len(calls) == 1 and moved.origin(0) == f"{copy}:1"
    assert prepare(path, options(tmp_path), Everything, partial(everything, times=2)).rows[3].length == 6
    write(tmp_path / "data.jsonl", list(range(1, 9)))
    assert prepare(path, options(tmp_path), Everything, everything).rows[0].number == 1
    assert len(calls) == 3
    (tmp_path / "data.json").write_bytes((tmp_path / "data.jsonl").read_bytes())  # another reader
    assert prepare(str(tmp_path / "data.json"), options(tmp_path), Everything, everything).read == 8
    assert len(calls) == 4


def _prepare_in_a_process(path: str, cache: str, results) -> None:
    prepared = prepare(path, DataOptions(cache_dir=cache, preprocessing_workers=2), Everything, everything)
    results.put((prepared.rows[100].number, prepared.read))


def test_two_processes_share_a_cache(tmp_path):
    """Of two concurrent processes one prepares, and both read the same rows."""
    path, cache = write(tmp_path / "data.jsonl", list(range(20_000))), str(tmp_path / "cache")
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    jobs = [fork.Process(target=_prepare_in_a_process, args=(path, cache, results)) for _ in range(2)]
    for job in jobs:
        job.start()
    assert [results.get(timeout=60) for _ in jobs] == [(101, 20_000)] * 2
    for job in jobs:
        job.join()
    assert len(folders(tmp_path)) == 1


def _no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def _prepare_as_rank(rank: int, path: str, cache: str, results) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    _prepare_in_a_process(path, cache, results)


def test_without_locks_the_first_rank_of_a_machine_prepares(tmp_path, monkeypatch):
    """The second rank, which comes first, waits; what another machine is writing stays."""
    path, cache = write(tmp_path / "data.jsonl", list(range(200))), tmp_path / "cache"
    build = module._build

    def build_once(folder: Path, *parts) -> None:
        assert os.environ["LOCAL_RANK"] == "0"
        Path(f"{folder}.tmp_other").mkdir()
        build(folder, *parts)

    monkeypatch.setattr(module, "_build", build_once)
    monkeypatch.setattr(files.fcntl, "flock", _no_locks)
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    for rank in (1, 0):
        fork.Process(target=_prepare_as_rank, args=(rank, path, str(cache), results), daemon=True).start()
        time.sleep(1 - rank)
    assert [results.get(timeout=30) for _ in range(2)] == [(101, 200)] * 2
    assert len(folders(tmp_path)) == 2


def test_without_locks_the_first_rename_wins(tmp_path, monkeypatch):
    """Two machines prepare the same source."""
    path, write_rows = write(tmp_path / "data.jsonl", list(range(9))), module._write

    def write_twice(folder: Path, *parts) -> dict:
        monkeypatch.setattr(module, "_write", write_rows)
        prepare(path, options(tmp_path), Everything, everything)
        return write_rows(folder, *parts)

    monkeypatch.setattr(files.fcntl, "flock", _no_locks)
    monkeypatch.setattr(module, "_write", write_twice)
    assert prepare(path, options(tmp_path), Everything, everything).read == 9
    assert len(folders(tmp_path)) == 1


def test_killed_process_leaves_no_workers_and_no_partial_table(tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    path, cache = write(tmp_path / "data.jsonl", list(range(3000))), str(tmp_path / "cache")
    fork = multiprocessing.get_context("fork")
    job = fork.Process(target=_prepare_in_a_process, args=(path, cache, fork.Queue()))
    job.start()
    while len(workers := psutil.Process(job.pid).children()) < 2:
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    monkeypatch.delenv("SLOW")
    assert prepare(path, options(tmp_path), Everything, everything).read == 3000
    assert len(folders(tmp_path)) == 1


def test_killed_worker_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_do_work", _kill_itself)
    path = write(tmp_path / "data.jsonl", list(range(3000)))
    with pytest.raises(UserError, match="killed; if memory ran out, use fewer --preprocessing_workers"):
        prepare(path, options(tmp_path, preprocessing_workers=2), Everything, everything)
    assert folders(tmp_path) == []


def _kill_itself(_: list) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_unwritable_cache_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"--cache_dir .*cache: (File exists|Not a directory)"):
        prepare(write(tmp_path / "data.jsonl", [1]), options(tmp_path), Everything, everything)


@pytest.mark.parametrize("workers", [1, 2])
def test_tokenising_logs_progress(tmp_path, monkeypatch, capsys, workers):
    """On any rank."""
    monkeypatch.setattr(progress, "FIRST_LINE", -1.0)
    monkeypatch.setattr(progress, "NEXT_LINES", 0.0)
    monkeypatch.setenv("RANK", "1")
    path = write(tmp_path / "data.jsonl", [*range(8, 4008)])
    prepare(path, options(tmp_path, preprocessing_workers=workers), Everything, everything)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: tokenising: 500 records (1") and "/s | ETA 0:00:0" in first
    assert last.startswith(f"{path}: tokenising: 4000 records (100%)")


def test_more_workers_than_cores_are_refused(tmp_path):
    path, cores = write(tmp_path / "data.jsonl", [1]), len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match=f"--preprocessing_workers {cores + 1}: .* allowed: 0 to {cores}"):
        prepare(path, options(tmp_path, preprocessing_workers=cores + 1), Everything, everything)
    assert not (tmp_path / "cache").exists()

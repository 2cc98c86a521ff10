"""Trackers offline: step 1, resumed. Skipped where a package is not installed (tests/README.md)."""

import contextlib
import importlib
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.stages import sft

Seen = Counter[tuple[int, str, float]]  # step, metric, value


def train(world: Path, output: Path, name: str, steps: int) -> str:
    """Run step 1 in a process of its own: trackers finish when it exits. Returns its output."""
    words = ["--save_steps", "2", "--eval_steps", "3", "--lr_scheduler_type", "constant", "--report_to", name]
    local = {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(output.parent / "trackio"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "step1_sft.main", *sft(world, output, steps), *words]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **local}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "warning: --report_to" not in done.stdout, done.stdout + done.stderr
    return done.stdout


def in_wandb(output: Path) -> Seen:
    """The lines of all offline runs, which `wandb sync` would upload; they must have one id."""
    pb = importlib.import_module("wandb.proto.wandb_internal_pb2")
    seen: Seen = Counter()
    files = sorted((output / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1 and len(files) == 2
    for file in files:
        for data in leveldb_records(file.read_bytes()):
            history = pb.Record.FromString(data).history.item
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history}
            step = values.pop("_step", 0)
            seen.update((step, name, value) for name, value in values.items() if not name.startswith("_"))
    return seen


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a log of LevelDB: parts with a header of 7 bytes, in blocks of 32 KiB."""
    position, record = 7, b""  # the file has a header too
    while position + 7 <= len(data):
        room = 2**15 - position % 2**15
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        if room < 7 or kind == 0:  # the end of a block is padded
            position += room
            continue
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            yield record
            record = b""


def in_mlflow(output: Path) -> Seen:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = importlib.import_module("mlflow").MlflowClient((output / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("triptych")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["learning_rate"] == "0.001"
    histories = [client.get_metric_history(run.info.run_id, name) for name in run.data.metrics]
    return Counter((point.step, point.key, point.value) for history in histories for point in history)


def in_trackio(output: Path) -> Seen:
    with contextlib.closing(sqlite3.connect(output.parent / "trackio/triptych.db")) as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics").fetchall()
    assert len({run for run, _, _ in rows}) == 1
    return Counter(
        (step, name, value) for _, step, metrics in rows for name, value in json.loads(metrics).items()
    )


@pytest.mark.parametrize(
    ("name", "read"), [("wandb", in_wandb), ("mlflow", in_mlflow), ("trackio", in_trackio)]
)
def test_a_resumed_run_continues_its_run_and_sends_every_step_once(
    world: Path, tmp_path: Path, name: str, read: Callable[[Path], Seen]
) -> None:
    """Step 3 is trained, and evaluated, a second time: its checkpoint is gone."""
    pytest.importorskip(name)
    output = tmp_path / "out"
    train(world, output, name, steps=3)
    shutil.rmtree(output / "checkpoints/step_000003")
    assert "resumed from" in train(world, output, name, steps=5)
    seen = read(output)
    assert set(Counter((step, metric) for step, metric, _ in seen.elements()).values()) == {1}
    assert without_times(seen) == without_times(lines(output))
    assert not (output / "tensorboard").exists()


def lines(output: Path) -> Seen:
    """What metrics.jsonl holds."""
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return Counter(
        (record["step"], name, value)
        for record in records
        for name, value in record.items()
        if name != "step"
    )


def without_times(seen: Seen) -> Seen:
    """Without what the clock and the machine decide."""
    return Counter(
        (step, metric, value)
        for step, metric, value in seen.elements()
        if not metric.startswith(("time/", "memory/")) and "per_second" not in metric
    )

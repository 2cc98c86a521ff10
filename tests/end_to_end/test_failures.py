"""Failures of long runs: bad numbers, full disks, signals, and dead ranks."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.training.stability import check_numbers
from common.training.train_state import TrainState
from step1_sft.options import SFTOptions
from tests.end_to_end.test_launch import LAUNCH
from tests.end_to_end.test_resume import STOPPED, checkpoints, steps_of, zero_config
from tests.ranks import run_stage, start_stage, succeed
from tests.stages import (
    metrics,
    ppo,
    reward,
    sft,
    timeless,
)

OVERFLOW = 1e39  # a number in JSON, infinite in fp32


@pytest.fixture(autouse=True)
def large_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ranks accept a margin that makes the loss infinite."""
    monkeypatch.setattr("step2_reward.data.LARGEST_MARGIN", math.inf)


# --- bad numbers --------------------------------------------------------------------------------------------


def margins(world: Path, output: Path, bad: Callable[[int], bool]) -> list[str]:
    """Options of step 2 on 64 pairs. The bad ones have a margin that makes the loss infinite."""
    lines = (world / "preferences.jsonl").read_text().splitlines()[:64]
    records = [json.loads(line) | {"margin": OVERFLOW if bad(i) else 0.0} for i, line in enumerate(lines)]
    output.parent.mkdir(exist_ok=True, parents=True)
    data = output.parent / "margins.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        *reward(world, world / "model", output, 8), "--train_data", str(data), "--eval_fraction", "0",
        "--use_margin", "--lr_scheduler_type", "constant",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("zero", "precision", "ranks"),
    [
        (0, "fp32", 2),
        (1, "bf16", 1),
        (1, "fp32", 2),
        (2, "fp32", 2),
        (2, "bf16", 2),
        (3, "fp32", 1),
        (3, "bf16", 2),
    ],
)
def test_one_bad_record_skips_one_update(
    world: Path, tmp_path: Path, zero: int, precision: str, ranks: int
) -> None:  # fmt: skip
    options = margins(world, tmp_path / "out", lambda i: i == 20)
    extra = zero_config(tmp_path, zero, precision)
    result = run_stage("step2_reward.main", [*options, *extra], tmp_path, ranks)
    assert result.codes == [0] * ranks, result.output
    skipped = metrics(tmp_path / "out", "train/skipped_updates")
    norms = metrics(tmp_path / "out", "train/grad_norm")
    bad = [step for step, norm in enumerate(norms) if norm is None]
    assert len(bad) == 1 and skipped == [float(step >= bad[0]) for step in range(8)]
    assert "margins.jsonl:21" in result.output and "updates skipped: 1" in result.output
    for file in (tmp_path / "out/final").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_too_many_bad_steps_end_the_run(world: Path, tmp_path: Path) -> None:
    options = [*margins(world, tmp_path / "out", lambda _: True), "--max_skipped_steps", "3"]
    result = run_stage("step2_reward.main", [*options, "--save_steps", "2"], tmp_path, ranks=2)
    assert result.codes == [2, 2]
    error = next(line for line in result.output.splitlines() if line.startswith("error:"))
    assert "3 steps in a row" in error and "margins.jsonl:" in error and "step_000002" in error
    succeed("step2_reward.main", [*options, "--export_only"], tmp_path, ranks=2)
    before, after = (load_file(f / "model.safetensors") for f in (world / "model", tmp_path / "out/final"))
    assert all(torch.equal(before[name], after[name]) for name in before if name in after)


def test_non_finite_rollout_is_skipped(world: Path, run: Path, tmp_path: Path) -> None:
    """If the scores overflow, the policy does not change, and the run ends with a reason."""
    broken = tmp_path / "reward"
    broken.mkdir()
    for file in (run / "reward/final").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], 3e38)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    options = [*ppo(world, run / "sft/final", broken, tmp_path / "out", 5), "--max_skipped_steps", "2"]
    result = run_stage("step3_ppo.main", [*options, "--save_steps", "1"], tmp_path, ranks=2)
    assert result.codes == [2, 2] and "2 steps in a row" in result.output, result.output
    assert "prompts.jsonl:" in result.output
    succeed("step3_ppo.main", [*options, "--export_only"], tmp_path)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (run / "sft/final", tmp_path / "out/final")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_loss_spike_is_logged_and_slow_drift_is_not(capsys: pytest.CaptureFixture) -> None:
    state, options = TrainState(), SFTOptions()
    for step in range(40):
        state.step = step
        check_numbers(state, options, 0, 2.0 - 0.01 * step + 0.02 * (step % 2), [])
    assert capsys.readouterr().out == "" and len(state.losses) == 32
    check_numbers(state, options, 0, 4.0, [])
    assert "step 39: loss spike: 4," in capsys.readouterr().out


# --- full disk ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(
    ("zero", "ranks", "fills_at"),
    [
        (0, 1, "step_000010"), pytest.param(3, 2, "step_000010", marks=pytest.mark.rare), (2, 2, ""),
        pytest.param(3, 2, "", marks=pytest.mark.rare),
    ],
)  # fmt: skip
def test_full_disk_does_not_end_training(
    world: Path, small_disk: Path, tmp_path: Path, zero: int, ranks: int, fills_at: str
) -> None:  # fmt: skip
    """Another program fills the disk after the first checkpoint, or before it."""
    output = small_disk / "out"
    steps = ["--save_steps", "10", "--save_total_limit", "1", "--lr_scheduler_type", "constant"]
    options = [*sft(world, output, 60), *zero_config(tmp_path, zero), *steps]
    uninterrupted = [*sft(world, tmp_path / "uninterrupted", 60), *zero_config(tmp_path, zero), *steps]
    succeed("step1_sft.main", uninterrupted, tmp_path, ranks)
    running = start_stage("step1_sft.main", options, tmp_path, ranks)
    running.wait_for(lambda: (output / "metrics.jsonl").exists())
    running.wait_for(lambda: (output / "checkpoints" / fills_at).exists() or not fills_at)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    result = running.result()
    assert "NOT saved" in result.output and "training continues" in result.output, result.output
    assert set(result.codes) == {2} and "run the command again with --export_only" in result.output
    folders = checkpoints(output)
    assert bool(folders) == bool(fills_at) and not any(folder.suffix for folder in folders), folders
    assert not list(output.glob("final*"))
    filler.unlink()
    if fills_at:
        succeed("step1_sft.main", [*options, "--export_only"], tmp_path, ranks)
    succeed("step1_sft.main", options, tmp_path, ranks)
    for file in (tmp_path / "uninterrupted/final").glob("*.safetensors"):
        assert file.read_bytes() == (output / "final" / file.name).read_bytes()
    assert timeless(output) == timeless(tmp_path / "uninterrupted")


# --- signals, through the launch script ---------------------------------------------------------------------


def launch(world: Path, output: Path, steps: int, *more: str, **variables: str) -> subprocess.Popen:
    words = ["bash", str(LAUNCH / "step1_sft.sh"), *sft(world, output, steps), "--save_steps", "1000000"]
    return subprocess.Popen(
        [*words, *more], env={**os.environ, "NUM_GPUS": "2", **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_steps(running: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + 300  # a busy machine is slow to start
    while not ((output / "metrics.jsonl").exists() and len(steps_of(output)) >= 2):
        if time.monotonic() > deadline:
            running.kill()
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.05)


def ranks_of(running: subprocess.Popen) -> list[psutil.Process]:
    processes = psutil.Process(running.pid).children(recursive=True)
    launcher = ["-m", "deepspeed.launcher.launch"]
    return [process for process in processes if process.parent().cmdline()[2:4] == launcher]


def deepspeed_of(running: subprocess.Popen) -> psutil.Process:
    return psutil.Process(running.pid).children()[0]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


TARGETS = {
    "script": lambda running: [psutil.Process(running.pid)],
    "deepspeed": lambda running: [deepspeed_of(running)],
    "launcher": lambda running: deepspeed_of(running).children(),
    "rank": lambda running: ranks_of(running)[1:],
    "all": lambda running: [
        psutil.Process(running.pid),
        *psutil.Process(running.pid).children(recursive=True),
    ],
}


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("script", signal.SIGTERM), ("script", signal.SIGINT), ("deepspeed", signal.SIGTERM),
        pytest.param("launcher", signal.SIGTERM, marks=pytest.mark.rare), ("rank", signal.SIGUSR1),
        pytest.param("all", signal.SIGTERM, marks=pytest.mark.rare),
        pytest.param("all", signal.SIGUSR1, marks=pytest.mark.rare),
    ],
)  # fmt: skip
def test_signal_stops_gracefully(world: Path, tmp_path: Path, target: str, number: int) -> None:
    running = launch(world, tmp_path / "out", 100_000)
    wait_for_steps(running, tmp_path / "out")
    processes = psutil.Process(running.pid).children(recursive=True)
    for process in TARGETS[target](running):
        process.send_signal(number)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == STOPPED, output
    assert "Traceback" not in output and not any(map(is_alive, processes))
    (folder,) = checkpoints(tmp_path / "out")
    step = int(folder.name.removeprefix("step_"))
    assert steps_of(tmp_path / "out")[-1] == step
    last = f"Stopped at step {step}; checkpoint {folder}. Run the same command to resume."
    assert output.splitlines()[-1] == last
    assert (tmp_path / "out/train.log").read_text().splitlines()[-1] == last


def test_signal_stops_tokenisation(world: Path, tmp_path: Path) -> None:
    line, _ = (world / "demonstrations.jsonl").read_text().split("\n", 1)
    (tmp_path / "many.jsonl").write_text(f"{line}\n" * 500_000)
    cache = tmp_path / "cache"
    options = "--train_data", str(tmp_path / "many.jsonl"), "--cache_dir", str(cache)
    running = launch(world, tmp_path / "run", 5, *options)
    while not list(cache.glob("*.tmp*")):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.05)
    time.sleep(1)
    processes = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == STOPPED, output
    assert output.splitlines()[-1].startswith("Stopped during preparation; nothing to save.")
    assert not (tmp_path / "run").exists()
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert not psutil.wait_procs(processes, timeout=60)[1]


def test_signal_to_the_pipeline_stops_its_step(world: Path, tmp_path: Path) -> None:
    paths = {"MODEL": world / "model", "OUTPUT": tmp_path, "DEMONSTRATIONS": world / "demonstrations.jsonl"}
    paths |= dict.fromkeys(("PREFERENCES", "PROMPTS"), world / "preferences.jsonl")
    words = ["--max_steps", "100000", "--logging_steps", "1", "--global_batch_size", "8"]
    running = subprocess.Popen(
        ["bash", str(LAUNCH / "pipeline.sh"), *words], env=os.environ | {k: str(v) for k, v in paths.items()},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_steps(running, tmp_path / "step1_sft")
    processes = psutil.Process(running.pid).children(recursive=True)
    running.terminate()
    output, _ = running.communicate(timeout=120)
    assert running.returncode == STOPPED, output
    assert not any(map(is_alive, processes)) and not (tmp_path / "step2_reward").exists()
    *_, stopped, last = output.splitlines()
    assert stopped.startswith("Stopped at step ")
    folder = f"({tmp_path}/step1_sft)"
    assert last == f"pipeline.sh: stopped in step1_sft.sh {folder}. Run the same command to resume."


def test_script_killed_during_startup_leaves_no_orphans(world: Path, tmp_path: Path) -> None:
    """After their imports, the ranks notice that the script is gone, and stop before the first step."""
    running = launch(world, tmp_path / "out", 100_000)
    deadline = time.monotonic() + 300
    while not ranks_of(running):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    deadline = time.monotonic() + 300
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_second_signal_kills(world: Path, tmp_path: Path) -> None:
    running = launch(world, tmp_path / "out", 100_000)
    wait_for_steps(running, tmp_path / "out")
    processes = psutil.Process(running.pid).children(recursive=True)
    for rank in ranks_of(running):
        rank.suspend()  # so that it cannot stop gracefully
    os.kill(running.pid, signal.SIGTERM)
    time.sleep(2.2)
    os.kill(running.pid, signal.SIGTERM)
    output, _ = running.communicate(timeout=120)
    assert running.returncode not in (0, STOPPED), output
    assert output.splitlines()[-2].startswith("Killed by a second signal"), output
    assert not psutil.wait_procs(processes, timeout=60)[1]  # a busy machine takes a moment


def test_other_ranks_end_when_one_dies(world: Path, tmp_path: Path) -> None:
    running = launch(world, tmp_path / "out", 100_000)
    wait_for_steps(running, tmp_path / "out")
    ranks = ranks_of(running)
    start = time.monotonic()
    ranks[1].kill()
    output, _ = running.communicate(timeout=120)
    assert time.monotonic() - start < 10
    assert running.returncode not in (0, 2, STOPPED), output
    *_, reason, last = output.splitlines()
    # With the signal, unless rank 0 loses the connection and ends before DeepSpeed checks.
    assert reason.startswith(("Rank 1 was killed (signal 9)", "Rank 1 was killed (no error message)")), output
    assert last == f"Failed with exit code 1; log: {tmp_path}/out/train.log"
    assert "Traceback" not in output
    assert not any(map(is_alive, ranks))


RAISES_ON_SIGNAL = """
import os, signal
def fail(*_):
    raise ArithmeticError("only rank 1 has this")
if os.environ.get("RANK") == "1":
    signal.signal(signal.SIGUSR2, fail)
"""


def test_the_first_traceback_comes_last(world: Path, tmp_path: Path) -> None:
    """One rank raises. The other loses the connection and adds one line, without a traceback."""
    (tmp_path / "sitecustomize.py").write_text(RAISES_ON_SIGNAL)
    running = launch(world, tmp_path / "out", 100_000, PYTHONPATH=str(tmp_path))
    wait_for_steps(running, tmp_path / "out")
    os.kill(ranks_of(running)[1].pid, signal.SIGUSR2)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 1
    last = [
        "ArithmeticError: only rank 1 has this",
        f"Failed with exit code 1; log: {tmp_path}/out/train.log",
    ]
    assert output.splitlines()[-2:] == last
    assert output.count("Traceback") == 1
    assert (tmp_path / "out/train.log").read_text().splitlines()[-2:] == last


@pytest.mark.rare
def test_random_kills_lose_nothing() -> None:
    """The short version of `python -m tests.chaos --kills 50`."""
    words = [sys.executable, "-m", "tests.chaos", "--kills", "2", "--stages", "sft", "--seed", "2"]
    done = subprocess.run(words, cwd=LAUNCH.parent, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills" in done.stdout and "all ended as undisturbed" in done.stdout


def test_collective_times_out(world: Path, tmp_path: Path) -> None:
    options = [*sft(world, tmp_path / "out", 100_000), "--timeout_minutes", "0.1"]
    running = start_stage("step1_sft.main", options, tmp_path, ranks=2)
    running.wait_for(lambda: (tmp_path / "out/metrics.jsonl").exists())
    os.kill(running.pids[1], signal.SIGSTOP)
    result = running.result()
    assert result.codes[0] == 1 and "Timed out waiting 6000ms" in result.output, result.output

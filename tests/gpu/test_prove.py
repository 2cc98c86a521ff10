"""The script that proves a GPU, on the CPU: refusals, failures that stop nothing else, and cheap checks."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from common.generation import compiled
from tests.gpu import four_bits, launched, passes, prove, sampling
from tests.gpu.prove import Check, run_all
from tests.gpu.setting import Outcome, Setting
from tests.ranks import FORK


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The script in this process; checks are forks."""
    monkeypatch.setattr(prove, "SPAWN", FORK)
    monkeypatch.setattr("sys.argv", ["prove.py", *words])
    return prove.main()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["no GPU", "--cpu"]),
        (["--cpu", "--only", "draws", "speed"], ["--only speed", "draws", "rollout"]),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], parts: list[str]
) -> None:
    assert call(monkeypatch, *words) == 2
    output, line = capsys.readouterr()
    assert not output and line.startswith("error: ") and line.count("\n") == 1
    assert all(part in line for part in parts)


def raises(_: Setting) -> Outcome:
    print("before")
    raise ValueError("the reason\nand more")


def crashes(_: Setting) -> Outcome:
    os._exit(3)


def hangs(setting: Setting) -> Outcome:
    child = os.fork()
    (setting.folder / "pid").write_text(str(child or os.getpid()))
    time.sleep(600)
    return Outcome(True, "")


def succeeds(_: Setting) -> Outcome:
    return Outcome(True, "well", {"host_bandwidth": 1.0})


@pytest.mark.end_to_end
def test_a_failure_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """An error, a crash and a check that is late, with the process that it has started."""
    monkeypatch.setattr(prove, "SPAWN", FORK)
    monkeypatch.setattr(prove, "SLOWER", 0.01)
    results = run_all(
        [Check(raises), Check(crashes), Check(hangs, 100), Check(succeeds)], Setting(tmp_path, True)
    )
    figures = {name: outcome.figure for name, (outcome, _) in results.items()}
    assert figures["raises"] == "the reason" and figures["succeeds"] == "well"
    assert "exit code 3" in figures["crashes"] and "not done after 1 s" in figures["hangs"]
    rows = capsys.readouterr().out.splitlines()
    assert [row[:4] for row in rows if row[0] != " "] == ["FAIL", "FAIL", "FAIL", "PASS"]
    assert "      | before" in rows and "      | ValueError: the reason" in rows
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_results_and_speeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(prove, "prepare", lambda _: None)
    files = tmp_path / "results.json", tmp_path / "speeds.json"
    words = ["--cpu", "--json", str(files[0]), "--speeds", str(files[1])]
    assert call(monkeypatch, *words, "--only", "speeds", "environment", "flash_attention") == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [
        ["PASS", "environment"], ["SKIP", "flash_attention"], ["PASS", "speeds"]
    ]  # fmt: skip
    assert last.startswith("2 passed, 0 failed, 1 skipped in ")
    results, speeds = (json.loads(file.read_text()) for file in files)
    assert {name: one["result"] for name, one in results.items()} == {
        "environment": "PASS", "flash_attention": "SKIP", "speeds": "PASS"
    }  # fmt: skip
    assert [*speeds] == ["host_bandwidth"] and speeds["host_bandwidth"] > 0


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "check", [sampling.draws, sampling.graphs, passes.adapters, four_bits.four_bits, four_bits.paging]
)
def test_checks_pass(tmp_path: Path, check: Callable[[Setting], Outcome]) -> None:
    outcome = check(Setting(tmp_path, True))
    if outcome.passed is None:
        pytest.skip(outcome.figure)
    assert outcome.passed, outcome.figure


def test_a_wrong_sampler_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = sampling.draw
    monkeypatch.setattr(sampling, "draw", lambda logits, *rest: right(logits * 0.8, *rest))
    assert not sampling.draws(Setting(tmp_path, True)).passed


def test_wrong_compiled_steps_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "RUN", lambda *inputs: 1.5 * compiled._step(*inputs))
    outcome = sampling.graphs(Setting(tmp_path, True))
    assert not outcome.passed and "REFUSED" in outcome.figure


def test_surprise() -> None:
    """By hand: two tokens, 20 draws, chi-square 0.8 with mean 1 and variance 2 + (4 - 6) / 20."""
    counts, expected = torch.tensor([8, 0, 12]), torch.tensor([10.0, 0.0, 10.0])
    assert sampling.surprise(counts, expected) == pytest.approx((0.8 - 1) / 1.9**0.5)


def test_distance(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "same", "other")]
    for file, value in zip(files, (1.0, 1.0, 1.5), strict=True):
        save_file({"weight": torch.tensor([0.0, value])}, file)
    assert launched.distance(files[:1], files[1:2]) == 0 and launched.distance(files[:1], files[2:]) == 0.5


@pytest.mark.rare
def test_a_check_through_the_launch_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "--cpu", "--only", "stop") == 0

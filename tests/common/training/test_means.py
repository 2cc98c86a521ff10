"""Means since the last logged line: weights, non-finite values, and a stop between two lines."""

import json
import math

import pytest

from common.training import metrics
from common.training.means import Mean, add_step, take_means
from common.training.metrics import MetricWriter
from common.training.train_state import TrainState

# Loss over 10, 30 and 20 tokens, accuracy over 1, 0 and 3 pairs.
STEPS = [
    {"loss": Mean(20.0, 10), "accuracy": Mean(1.0, 1), "lr": 0.3},
    {"loss": Mean(30.0, 30), "accuracy": Mean(0.0, 0), "lr": 0.2},
    {"loss": Mean(10.0, 20), "accuracy": Mean(1.0, 3), "lr": 0.1},
]


def test_means_are_weighted_and_plain_numbers_are_not_averaged() -> None:
    sums = {}
    for step in STEPS:
        add_step(sums, step)
    assert take_means(sums, STEPS[-1]) == {"loss": 1.0, "accuracy": 0.5, "lr": 0.1}
    add_step(sums, STEPS[0])
    assert take_means(sums, STEPS[0]) == {"loss": 2.0, "accuracy": 1.0, "lr": 0.3}, "the sums are reset"


def test_non_finite_values_are_left_out() -> None:
    sums = {}
    for step in (STEPS[0], {"loss": Mean(math.nan, 99)}, {"loss": Mean(math.inf, 99)}, STEPS[1]):
        add_step(sums, step)
    assert take_means(sums, STEPS[1])["loss"] == 50 / 40
    add_step(sums, {"loss": Mean(math.inf, 3)})
    assert math.isnan(take_means(sums, {})["loss"]), "no step had a finite value"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def train(folder, start: int, end: int, state: TrainState, clock: list[float], total: int = 7) -> TrainState:
    """Train with steps of 2 s, the first with 60 s more; then write and read a checkpoint."""
    writer = MetricWriter(str(folder), start, total, logging_steps=3)
    for step in range(start, end):
        state.step += 1
        seconds = 2.0 + 60.0 * (step == start)
        clock[0] += seconds
        step_metrics = {"train/loss": Mean(0.1 * step * (step + 1), step + 1), "time/step": Mean(seconds)}
        writer.step(state, step_metrics, ["train/loss"])
    return TrainState(**json.loads(json.dumps(state.plain())))


def losses(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{"step": line["step"], "loss": line["train/loss"]} for line in lines]


def test_a_run_stopped_between_two_lines_logs_the_same_means(tmp_path, clock) -> None:
    for name in ("unbroken", "parts"):
        (tmp_path / name).mkdir()
    train(tmp_path / "unbroken", 0, 7, TrainState(), clock)
    state = train(tmp_path / "parts", 0, 2, TrainState(), clock)
    state = train(tmp_path / "parts", 2, 5, state, clock)
    train(tmp_path / "parts", 5, 7, state, clock)
    assert losses(tmp_path / "parts") == losses(tmp_path / "unbroken")
    expected = [
        sum(0.1 * s * (s + 1) for s in steps) / sum(s + 1 for s in steps)
        for steps in ([0, 1, 2], [3, 4, 5], [6])
    ]
    assert [line["loss"] for line in losses(tmp_path / "unbroken")] == pytest.approx(expected)


def test_a_run_that_ends_early_logs_its_last_steps(tmp_path, clock) -> None:
    """A second flush writes nothing."""
    state = train(tmp_path, 0, 5, TrainState(), clock)
    writer = MetricWriter(str(tmp_path), 5, 7, logging_steps=3)
    for _ in range(2):
        writer.flush(state, {"train/lr": 0.1}, ["train/loss"])
    assert [line["step"] for line in losses(tmp_path)] == [3, 5]
    assert losses(tmp_path)[1]["loss"] == pytest.approx(0.1 * (3 * 4 + 4 * 5) / (4 + 5))


def test_remaining_time_excludes_the_first_step(tmp_path, clock, capsys) -> None:
    state = train(tmp_path, 0, 3, TrainState(), clock)
    clock[0] += 1000  # an evaluation
    assert "step 3/7 | train/loss 0.1333 | ETA 0:00:08" in capsys.readouterr().out
    train(tmp_path, 3, 7, state, clock)
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("ETA 0:00:02") and last.endswith("elapsed 0:01:08 since step 3")


def test_remaining_time_is_unknown_before_the_second_step(tmp_path, capsys) -> None:
    MetricWriter(str(tmp_path), 0, 9, 1).log(0, {"eval/loss": 1.0}, ["eval/loss"])
    assert capsys.readouterr().out == "step 0/9 | eval/loss 1 | ETA ?\n"


def test_lines_of_repeated_steps_are_replaced(tmp_path) -> None:
    """A run resumed from step 2 writes step 3 again; another process has written up to step 4."""
    for start, end in ((0, 4), (2, 3)):
        writer = MetricWriter(str(tmp_path), start, 9, logging_steps=1)
        for step in range(start + 1, end + 1):
            writer.log(step, {"train/loss": float(start + step)}, [])
    assert losses(tmp_path) == [{"step": n, "loss": loss} for n, loss in ((1, 1.0), (2, 2.0), (3, 5.0))]

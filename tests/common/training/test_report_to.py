"""Trackers: every metric of a step once, also across stops; services that fail; packages that are missing."""

import math
from pathlib import Path
from typing import Any

import pytest

from common.runtime.options import UserError
from common.training import options as options_module
from common.training import report_to
from common.training.metrics import MetricWriter
from common.training.options import PACKAGES, check_trackers
from common.training.report_to import Trackers
from step1_sft.options import SFTOptions
from tests.conftest import REPOSITORY

Received = dict[str, list[tuple[int, str, float]]]  # by service and id of the run


@pytest.fixture
def failing() -> set[int]:
    """Steps at which services fail."""
    return set()


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch, failing: set[int]) -> Received:
    """Services that record what they get."""
    by_run: Received = {}

    class Service:
        def __init__(self, name: str, run: report_to.Run) -> None:
            self.metrics = by_run.setdefault(f"{name} {run.id}", [])

        def add(self, step: int, metrics: dict[str, float]) -> None:
            if step in failing:
                raise ConnectionError("no route\nto the host")
            self.metrics += [(step, name, value) for name, value in metrics.items()]

        def close(self) -> None:
            pass

    monkeypatch.setattr(report_to, "open_tracker", Service)
    return by_run


def start(folder: Path, step: int, *names: str) -> MetricWriter:
    """Start a run, or resume it from a checkpoint of a step."""
    options: Any = SFTOptions(output_dir=str(folder), report_to=list(names))
    return MetricWriter(str(folder), step, 9, 1, Trackers(options, step))


def losses(writer: MetricWriter, *steps: int, name: str = "train/loss") -> None:
    for step in steps:
        writer.log(step, {name: step / 10}, [])


def test_a_resumed_run_sends_no_step_twice(tmp_path: Path, received: Received) -> None:
    """Killed after step 4 and again after step 3, resumed from step 2, the second time with more to do."""
    for first, last in ((0, 4), (2, 3), (2, 6)):
        losses(start(tmp_path, first, "wandb", "mlflow"), *range(first + 1, last + 1))
    names = [key.split()[0] for key in received]
    assert names == ["wandb", "mlflow"] and len({key.split()[1] for key in received}) == 1
    for metrics in received.values():
        assert metrics == [(step, "train/loss", step / 10) for step in range(1, 7)]


def test_an_evaluation_that_a_stop_delayed_is_sent(tmp_path: Path, received: Received) -> None:
    """It has the step of training metrics that were sent before; repeated, it is not sent again."""
    losses(start(tmp_path, 0, "trackio"), 1, 2)
    for _ in range(2):
        losses(start(tmp_path, 2, "trackio"), 2, name="eval/loss")
    (metrics,) = received.values()
    assert metrics == [(1, "train/loss", 0.1), (2, "train/loss", 0.2), (2, "eval/loss", 0.2)]


def test_a_tracker_added_later_gets_the_earlier_metrics(tmp_path: Path, received: Received) -> None:
    """It begins with an evaluation of the step that was trained last."""
    losses(start(tmp_path, 0, "none"), 0, 1, 2)
    writer = start(tmp_path, 2, "wandb")
    losses(writer, 2, name="eval/loss")
    losses(writer, 3)
    (metrics,) = received.values()
    assert [(step, name[:4]) for step, name, _ in metrics] == [
        (0, "trai"), (1, "trai"), (2, "trai"), (2, "eval"), (3, "trai"),
    ]  # fmt: skip


def test_a_failure_leaves_a_tracker_out_until_the_next_start(
    tmp_path: Path, received: Received, failing: set[int], capsys: pytest.CaptureFixture
) -> None:
    failing.add(2)
    losses(start(tmp_path, 0, "wandb"), 1, 2, 3, 4)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: --report_to wandb failed at step 2 and is off until the next start: no route;"
        " metrics.jsonl has all metrics"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    losses(start(tmp_path, 4, "wandb"), 5)
    (metrics,) = received.values()
    assert [step for step, _, _ in metrics] == [1, 3, 4, 5]  # step 2 may have arrived, or not


def test_only_finite_numbers_are_sent(tmp_path: Path, received: Received) -> None:
    start(tmp_path, 0, "wandb").log(1, {"train/loss": math.nan, "train/lr": 0.5}, [])
    (metrics,) = received.values()
    assert metrics == [(1, "train/lr", 0.5)]


def test_tensorboard_alone_by_default_and_no_tracker_on_request(tmp_path: Path) -> None:
    assert SFTOptions().report_to == ["tensorboard"]
    for name in ("tensorboard", "none"):
        (tmp_path / name).mkdir()
        losses(start(tmp_path / name, 0, name), 1)
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == {"metrics.jsonl", "tensorboard"}
    assert {path.name for path in (tmp_path / "none").iterdir()} == {"metrics.jsonl"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "_is_installed", lambda _: False)
    with pytest.raises(
        UserError, match=f"^--report_to {name}: .* is not installed: .*pip install"
    ) as refused:
        check_trackers(SFTOptions(report_to=["tensorboard", name]))
    requirements = (REPOSITORY / str(refused.value).split()[-1]).read_text()
    assert f"\n{PACKAGES[name][0]}==" in requirements
    check_trackers(SFTOptions(report_to=["tensorboard"]))
    monkeypatch.setattr(options_module, "_is_installed", lambda package: package == PACKAGES[name][-1])
    check_trackers(SFTOptions(report_to=["tensorboard", name]))

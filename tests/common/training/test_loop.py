"""Evaluations, checkpoints and stops of the training loop."""

from pathlib import Path

import numpy as np
import pytest

from common.runtime.process import Stopped
from common.training import loop as loop_module
from common.training.loop import TrainingLoop
from common.training.means import Mean
from common.training.train_state import TrainState
from step1_sft.options import SFTOptions


class Rows(list):
    """Examples; the number of each is its length in tokens."""

    def notes(self, name: str) -> np.ndarray:
        assert name == "length"
        return np.array(self)

    def origin(self, index: int) -> str:
        return f"rows.jsonl:{index + 1}"


@pytest.fixture
def make_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Factory for loops of 4 steps over 8 examples, 2 held out; checkpoints are recorded, not written."""
    saved: list[int] = []

    def make(state: TrainState | None = None, patience: int = 0, **options) -> tuple[TrainingLoop, list[int]]:
        monkeypatch.setattr(loop_module, "resume", lambda *_: state or TrainState(total_steps=4))
        options = SFTOptions(output_dir=str(tmp_path), max_steps=4, **{"logging_steps": 1, **options})
        loop = TrainingLoop(options, Rows(range(8)), [1, 2], {}, batch_size=2, patience=patience)
        loop.resume({}, "examples")
        return loop, saved

    monkeypatch.setattr(loop_module, "open_run", lambda *_: None)
    monkeypatch.setattr(loop_module, "init_distributed", lambda *_: None)
    monkeypatch.setattr(loop_module, "save_checkpoint", lambda _, state, __: saved.append(state.step) or True)
    return make


def train(loop: TrainingLoop, values: list[float]) -> list[int]:
    """Train to the end; values: eval/loss of each evaluation. Returns the steps of the evaluations."""
    evaluated = []

    def evaluate() -> bool:
        evaluated.append(loop.state.step)
        return loop.log_evaluation({"eval/loss": values.pop(0)}, [])

    if loop.first_evaluation_is_due:
        evaluate()
    for indices in loop.batches():
        assert len(indices) == 2
        metrics = {"train/loss": Mean(2.0), "train/grad_norm": Mean(1.0), "time/step": Mean(0.1)}
        loop.finish_step(metrics, ["train/loss"])
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate())
    return evaluated


def test_evaluations_before_the_first_step_at_intervals_and_after_the_last_step(make_loop) -> None:
    loop, _ = make_loop(eval_steps=3)
    assert train(loop, [3.0, 2.0, 1.0]) == [0, 3, 4]
    loop, _ = make_loop(eval_steps=0)
    assert train(loop, [3.0, 2.0]) == [0, 4]


def test_a_resumed_run_evaluates_first_only_after_a_missing_evaluation(make_loop) -> None:
    for unevaluated in (False, True):
        loop, _ = make_loop(TrainState(step=2, unevaluated=unevaluated), eval_steps=0)
        assert loop.first_evaluation_is_due == unevaluated


def test_checkpoints_at_intervals_at_the_best_step_and_at_the_end(make_loop) -> None:
    loop, saved = make_loop(save_steps=3, eval_steps=1, best_metric="eval/loss")
    train(loop, [5.0, 6.0, 4.0, 6.0, 6.0])
    assert saved == [2, 3, 4] and loop.state.best_step == 2


def test_early_stopping(make_loop, capsys: pytest.CaptureFixture) -> None:
    loop, saved = make_loop(
        patience=2, eval_steps=1, save_steps=100, best_metric="eval/loss", logging_steps=9
    )
    train(loop, [5.0, 6.0, 7.0, 1.0, 1.0])
    lines = capsys.readouterr().out
    assert loop.state.step == 2 and saved == [2] and loop.has_stalled
    assert "stopped early: 2 evaluations without a better eval/loss" in lines
    assert "step 2/4 | train/loss 2" in lines  # although no line was due


def test_a_requested_stop_saves_a_checkpoint_except_at_the_last_step(
    make_loop, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for step in (2, 4):
        loop, saved = make_loop(eval_steps=0, save_steps=0)
        monkeypatch.setattr(loop_module, "stop_requested", lambda _: loop.state.step == step)  # noqa: B023
        saved.clear()
        if step == 4:
            train(loop, [1.0, 1.0])
            assert saved == []
            continue
        with pytest.raises(
            Stopped, match="Stopped at step 2; checkpoint .*step_000002. Run the same command"
        ):
            train(loop, [1.0])
        assert saved == [2]


@pytest.mark.parametrize(
    ("is_saved", "chosen", "line"),
    [
        (True, "latest", "checkpoint {}. Run the same command to finish."),
        (False, "latest", "NOT saved. Run the same command to resume from an older one, or to start again."),
        (False, "none", "NOT saved. Run the same command with --resume_from_checkpoint latest to resume"),
    ],
)
def test_a_stop_after_training_names_the_next_command(
    make_loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved: bool, chosen: str, line: str
) -> None:
    loop, _ = make_loop(TrainState(step=3), resume_from_checkpoint=chosen)
    monkeypatch.setattr(loop_module, "save_checkpoint", lambda *_: is_saved)
    with pytest.raises(Stopped) as stopped:
        loop.stop_after_training()
    assert line.format(tmp_path / "checkpoints/step_000003") in str(stopped.value)

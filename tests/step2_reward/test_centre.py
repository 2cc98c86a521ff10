"""A stop while demonstrations are scored: at the end of step 2, and for best/ in the middle."""

import json
import os
import signal
from pathlib import Path

import pytest

from step2_reward.evaluation import main as evaluate
from tests.end_to_end.test_resume import STOPPED, assert_same_end, checkpoints
from tests.ranks import run_stage, succeed
from tests.stages import (
    metrics,  # noqa: F401 - world is a fixture
    reward,  # noqa: F401 - world is a fixture
)

MAIN = "step2_reward.main"


def stop_at(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """Send SIGTERM in the middle of the pass with this number."""
    track, count = evaluate.track, [0]

    def watched(title: str, batches, total):
        count[0] += title == "scoring demonstrations"
        for number, batch in enumerate(track(title, batches, total)):
            if title == "scoring demonstrations" and count[0] == passes and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(evaluate, "track", watched)


def test_a_stop_after_the_last_step_is_finished_by_the_same_command(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Also with fewer demonstrations to score, which a resumed run may change."""
    options = [*reward(world, world / "model", tmp_path / "out", 2), "--eval_fraction", "0"]
    with monkeypatch.context() as patched:
        stop_at(patched, passes=1)
        stopped = run_stage(MAIN, options, tmp_path, ranks=2)
    assert stopped.codes == [STOPPED] * 2, stopped.output
    (checkpoint,) = checkpoints(tmp_path / "out")
    assert f"Stopped after the last step; checkpoint {checkpoint}" in stopped.output
    assert not (tmp_path / "out/final").exists()
    result = run_stage(MAIN, [*options, "--max_centre_samples", "8"], tmp_path)
    assert result.codes == [0] and "scores of 8 demonstrations" in result.output, result.output
    assert len(metrics(tmp_path / "out", "train/loss")) == 2, "nothing was trained again"


def test_a_stop_before_best_is_written_is_made_up_for(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The second best evaluation is that of step 1; the resumed run writes its best/ and goes on."""
    for name in ("whole", "parts"):
        options = [*reward(world, world / "model", tmp_path / name, 3), "--best_metric", "eval/loss"]
        options += ["--eval_steps", "1", "--max_centre_samples", "16"]
        if name == "whole":
            succeed(MAIN, options, tmp_path)
    with monkeypatch.context() as patched:
        stop_at(patched, passes=2)
        stopped = run_stage(MAIN, options, tmp_path)
    assert stopped.codes == [STOPPED], stopped.output
    (step,) = [int(folder.name.removeprefix("step_")) for folder in checkpoints(tmp_path / "parts")]
    state = json.loads((checkpoints(tmp_path / "parts")[0] / "state.json").read_text())
    assert step == 1 and state["best_unwritten"] and state["best_step"] == 1
    resumed = run_stage(MAIN, options, tmp_path)
    assert resumed.codes == [0], resumed.output
    assert resumed.output.index("/parts/best") < resumed.output.index("step 2/3")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    best = [tmp_path / name / "best/model.safetensors" for name in ("whole", "parts")]
    assert best[0].read_bytes() == best[1].read_bytes()

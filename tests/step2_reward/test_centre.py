"""Stop and resume while demonstrations are scored: after the last step, and before best/ is written."""

import json
import os
import signal
from pathlib import Path

import pytest

from step2_reward.evaluation import scores
from tests.end_to_end.test_resume import STOPPED, assert_same_end, checkpoints
from tests.ranks import run_stage, succeed
from tests.stages import (
    metrics,
    reward,
)

MAIN = "step2_reward.main"


def stop_at(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """Send SIGTERM in the middle of this scoring pass."""
    track, count = scores.track, [0]

    def watched(title: str, batches, total):
        count[0] += title == "scoring demonstrations"
        for number, batch in enumerate(track(title, batches, total)):
            if title == "scoring demonstrations" and count[0] == passes and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(scores, "track", watched)


def test_resume_after_a_stop_behind_the_last_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A resumed run may change the number of demonstrations."""
    options = [*reward(world, world / "model", tmp_path / "out", 2), "--eval_fraction", "0"]
    with monkeypatch.context() as patched:
        stop_at(patched, passes=1)
        stopped = run_stage(MAIN, options, tmp_path, ranks=2)
    assert stopped.codes == [STOPPED] * 2, stopped.output
    (checkpoint,) = checkpoints(tmp_path / "out")
    assert f"Stopped after the last step; checkpoint {checkpoint}" in stopped.output
    assert not (tmp_path / "out/final").exists()
    result = run_stage(MAIN, [*options, "--max_centre_samples", "8"], tmp_path)
    assert result.codes == [0] and "raw scores of 8 responses" in result.output, result.output
    assert len(metrics(tmp_path / "out", "train/loss")) == 2, "nothing was trained again"


def test_resume_writes_the_best_model_that_a_stop_prevented(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Step 1 improves on step 0; the resumed run writes best/ before it trains."""
    for name in ("unbroken", "resumed"):
        options = [*reward(world, world / "model", tmp_path / name, 3), "--best_metric", "eval/loss"]
        options += ["--eval_steps", "1", "--max_centre_samples", "16"]
        if name == "unbroken":
            succeed(MAIN, options, tmp_path)
    with monkeypatch.context() as patched:
        stop_at(patched, passes=2)
        stopped = run_stage(MAIN, options, tmp_path)
    assert stopped.codes == [STOPPED], stopped.output
    (step,) = [int(folder.name.removeprefix("step_")) for folder in checkpoints(tmp_path / "resumed")]
    state = json.loads((checkpoints(tmp_path / "resumed")[0] / "state.json").read_text())
    assert step == 1 and state["best_unwritten"] and state["best_step"] == 1
    resumed = run_stage(MAIN, options, tmp_path)
    assert resumed.codes == [0], resumed.output
    assert resumed.output.index("/resumed/best") < resumed.output.index("step 2/3")
    assert_same_end(tmp_path / "unbroken", tmp_path / "resumed")
    best = [tmp_path / name / "best/model.safetensors" for name in ("unbroken", "resumed")]
    assert best[0].read_bytes() == best[1].read_bytes()

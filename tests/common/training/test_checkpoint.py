"""Names and damage of checkpoints, and what is logged about the end of a run."""

from pathlib import Path

import pytest

from common.training.checkpoint import find_checkpoint, list_checkpoints
from common.training.resume import _continued
from common.training.train_state import TrainState
from step1_sft.options import SFTOptions


def checkpoint(folder: Path, name: str, state: str = "{}", manifest: str = '{"files": {}}') -> Path:
    (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints" / name / "state.json").write_text(state)
    (folder / "checkpoints" / name / "manifest.json").write_text(manifest)
    return folder / "checkpoints" / name


def test_a_copy_of_a_checkpoint_does_not_count(tmp_path: Path) -> None:
    for name in ("step_000010.bak", "step_000004.tmp", "step_final", "step_", "step_1000000", "step_000010"):
        checkpoint(tmp_path, name)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000010", "step_1000000"]


@pytest.mark.parametrize(
    ("state", "manifest"), [("{}", "[]"), ("[]", '{"files": {}}'), ('{"stray": 1}', '{"files": {}}')]
)
def test_a_file_of_the_wrong_shape_is_damage(tmp_path: Path, capsys, state: str, manifest: str) -> None:
    older = checkpoint(tmp_path, "step_000001")
    checkpoint(tmp_path, "step_000002", state, manifest)
    assert find_checkpoint(SFTOptions(output_dir=str(tmp_path))).folder == older
    assert "step_000002 is damaged (state.json or manifest.json: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "schedule", "is_told"), [(10, "cosine", False), (9, "constant", False), (9, "cosine", True)]
)
def test_a_schedule_is_told_where_steps_follow_it(capsys, step: int, schedule: str, is_told: bool) -> None:
    _continued(TrainState(step=step, total_steps=20), SFTOptions(lr_scheduler_type=schedule), 10)
    line = capsys.readouterr().out
    assert line.startswith("the run ends at step 10 now, planned were 20")
    assert ("learning rate" in line) == is_told == ("from step 10 on" in line)

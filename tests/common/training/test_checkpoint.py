"""Names of checkpoints, damaged checkpoints, and the log line for a changed number of steps."""

from pathlib import Path

import pytest

from common.training.checkpoint import find_checkpoint, list_checkpoints
from common.training.resume import _set_total_steps
from common.training.train_state import TrainState
from step1_sft.options import SFTOptions


def checkpoint(folder: Path, name: str, state: str = "{}", manifest: str = '{"files": {}}') -> Path:
    (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints" / name / "state.json").write_text(state)
    (folder / "checkpoints" / name / "manifest.json").write_text(manifest)
    return folder / "checkpoints" / name


def test_copies_of_checkpoints_are_ignored(tmp_path: Path) -> None:
    for name in ("step_000010.bak", "step_000004.tmp", "step_final", "step_", "step_1000000", "step_000010"):
        checkpoint(tmp_path, name)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000010", "step_1000000"]


@pytest.mark.parametrize(
    ("state", "manifest"), [("{}", "[]"), ("[]", '{"files": {}}'), ('{"stray": 1}', '{"files": {}}')]
)
def test_a_json_file_with_wrong_content_is_damage(tmp_path: Path, capsys, state: str, manifest: str) -> None:
    older = checkpoint(tmp_path, "step_000001")
    checkpoint(tmp_path, "step_000002", state, manifest)
    assert find_checkpoint(SFTOptions(output_dir=str(tmp_path))).folder == older
    assert "step_000002 is damaged (state.json or manifest.json: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "schedule", "is_logged"), [(10, "cosine", False), (9, "constant", False), (9, "cosine", True)]
)
def test_a_new_schedule_is_logged_if_steps_remain(capsys, step: int, schedule: str, is_logged: bool) -> None:
    _set_total_steps(TrainState(step=step, total_steps=20), SFTOptions(lr_scheduler_type=schedule), 10)
    line = capsys.readouterr().out
    assert line.startswith("the run now ends at step 10 instead of 20")
    assert ("learning rate" in line) == is_logged == ("from step 10 on" in line)

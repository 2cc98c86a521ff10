"""Claiming an output directory: damaged files, folders in use, and changed data."""

from pathlib import Path

import pytest

from common.runtime import process
from common.runtime.files import lock_folder
from common.runtime.options import UserError
from common.training import run_folder
from common.training.run_folder import _compare_data, prepare_output
from step1_sft.options import SFTOptions
from step2_reward.options import RewardOptions


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> list:
    """List of the actions that a refusal undoes; restored after each test."""
    monkeypatch.setattr(process, "_undo", [])
    monkeypatch.setattr(run_folder, "_locks", [])
    return process._undo


@pytest.mark.parametrize("name", ["options.json", "fingerprint.json"])
@pytest.mark.parametrize("content", [b"[]", b"{", b"", b"\xff\xfe{"])
def test_a_damaged_file_is_an_error_of_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as refused:
        prepare_output(SFTOptions(output_dir=str(tmp_path)), {})
    assert "\n" not in str(refused.value) and (tmp_path / name).read_bytes() == content


def test_a_command_refused_by_the_lock_undoes_nothing(tmp_path: Path, undone: list) -> None:
    with lock_folder(tmp_path), pytest.raises(UserError, match="in use by process"):
        prepare_output(SFTOptions(output_dir=str(tmp_path)), {})
    assert not undone
    prepare_output(SFTOptions(output_dir=str(tmp_path)), {})
    assert len(undone) == 1


def test_demonstrations_for_centring_may_change(tmp_path: Path, capsys) -> None:
    """They do not train the model; training data must not change."""
    options = RewardOptions(output_dir=str(tmp_path), train_data=["T"], demonstration_data=["D"])
    earlier = {"--train_data 1": "a", "--demonstration_data 1": "b", "--demonstration_data 2": "c"}
    _compare_data(options, earlier, {"--train_data 1": "a", "--demonstration_data 1": "d"})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "D (--demonstration_data, file 1): the records have changed"
    ) and second.startswith("file 2 of --demonstration_data: ")
    with pytest.raises(UserError, match=r": T \(--train_data, file 1\) has changed since this run started;"):
        _compare_data(options, earlier, {**earlier, "--train_data 1": "x", "--demonstration_data 1": "d"})

"""Files that a library wrote."""

import os
from pathlib import Path

import pytest

from common import files
from common.files import flush_file


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_of_a_library_gets_the_mode_of_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int, mode: int
) -> None:
    """Also one that was written through a temporary file of mode 0600, as safetensors does."""
    monkeypatch.setattr(files, "UMASK", umask)
    path = tmp_path / "model.safetensors"
    path.touch(0o600)
    flush_file(path)
    assert path.stat().st_mode & 0o777 == mode


def test_the_umask_is_that_of_the_process() -> None:
    current = os.umask(0o022)
    os.umask(current)
    assert current == files.UMASK

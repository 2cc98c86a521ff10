"""Output folders, and the names of files in errors."""

import errno
from pathlib import Path

import pytest

from common.runtime.files import make_folder, replacing
from common.runtime.options import UserError


def test_make_folder(tmp_path):
    assert make_folder("output_dir", str(tmp_path / "a/b")).is_dir()
    assert make_folder("output_dir", str(tmp_path / "a/b")) == tmp_path / "a/b"
    (tmp_path / "file").write_text("")
    for path, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        with pytest.raises(UserError, match=f"^--output_dir .*{path}: {reason}$"):
            make_folder("output_dir", str(tmp_path / path))


@pytest.mark.parametrize(
    ("error", "name"),
    [(OSError(errno.ENOSPC, "full"), "new"), (PermissionError(errno.EACCES, "denied", "other"), "other")],
)
def test_an_error_names_its_own_file(tmp_path: Path, error: OSError, name: str) -> None:
    with pytest.raises(OSError) as raised, replacing(tmp_path / "new"):
        raise error
    assert Path(raised.value.filename).name == name and not [*tmp_path.iterdir()]

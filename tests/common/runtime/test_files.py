"""Output folders."""

import pytest

from common.runtime.files import make_folder
from common.runtime.options import UserError


def test_make_folder(tmp_path):
    assert make_folder("output_dir", str(tmp_path / "a/b")).is_dir()
    assert make_folder("output_dir", str(tmp_path / "a/b")) == tmp_path / "a/b"
    (tmp_path / "file").write_text("")
    for path, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        with pytest.raises(UserError, match=f"^--output_dir .*{path}: {reason}$"):
            make_folder("output_dir", str(tmp_path / path))

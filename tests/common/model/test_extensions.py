"""Compilation of extensions."""

import multiprocessing
import time
from pathlib import Path

import pytest

from common.model import extensions
from common.model.extensions import single_compilation


def test_lock_of_a_killed_compilation_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/lock").touch()
    (tmp_path / "cpu_adam/cpu_adam.so").touch()
    with single_compilation():
        assert [path.name for path in (tmp_path / "cpu_adam").iterdir()] == ["cpu_adam.so"]


def compile_slowly(folder: Path) -> None:
    with single_compilation():
        lock = folder / "cpu_adam/lock"
        lock.touch(exist_ok=False)
        time.sleep(0.2)
        lock.unlink()  # fails if another process has removed it


def test_processes_compile_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=compile_slowly, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_folder_differs_by_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = extensions._folder()
    assert folder.parent == tmp_path / "triptych/extensions" and folder == extensions._folder()
    monkeypatch.setattr(extensions.platform, "machine", lambda: "other")
    assert extensions._folder() != folder

"""The launcher of this rank: its processes, and notes to its launch script."""

import os
from pathlib import Path

import psutil


def launcher() -> psutil.Process | None:
    """DeepSpeed's launcher on this machine; None without one."""
    parent = psutil.Process().parent()
    return parent if parent is not None and "deepspeed.launcher.launch" in parent.cmdline() else None


def guardians(launcher: psutil.Process) -> list[int]:
    """The processes without which the ranks have to stop: the launcher, its parent, and the launch script."""
    pids = [launcher.pid, *(process.pid for process in launcher.parents()[:1])]
    if "TRIPTYCH_SUPERVISOR" in os.environ:
        pids.append(int(os.environ["TRIPTYCH_SUPERVISOR"]))
    return pids


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def note(name: str, text: str) -> bool:
    """Write for the launch script how this rank ended. Returns False without a launch script."""
    folder = os.environ.get("TRIPTYCH_ENDINGS")
    try:
        return bool(folder) and (Path(folder) / name).write_text(text) >= 0
    except OSError:
        return False

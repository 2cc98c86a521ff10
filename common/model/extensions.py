"""Compilation of DeepSpeed's extensions: one process at a time, for this kind of CPU."""

import contextlib
import fcntl
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def single_compilation() -> Iterator[None]:
    """Let the other processes of this machine wait until this one has loaded an extension.

    torch marks a running compilation with a file `lock`, and waits for ever if its process was killed. Here
    such a file is stale, and is removed. Each kind of CPU has its own folder, because DeepSpeed compiles for
    the instructions of the machine, and machines may share a home.
    """
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_folder())))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{platform.node()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for stale in folder.glob("*/lock"):
            stale.unlink(missing_ok=True)
        yield


def _folder() -> Path:
    """~/.cache/triptych/extensions/ID, with an ID of torch's version and the CPU."""
    import torch

    cpu = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")}
    identity = hashlib.sha256(repr((torch.__version__, platform.machine(), sorted(cpu))).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "triptych/extensions" / identity[:12]

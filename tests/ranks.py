"""Run a stage's `main` on some ranks by forking this process, which has the heavy imports done already.

The launcher takes five seconds per start, a fork a fraction of one; a few tests use the launcher all the
same.
"""

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import peft  # noqa: F401
import torch
import torch.utils.tensorboard
import transformers  # noqa: F401

from common.runtime.process import run_main
from launch.lib.free_port import free_port

FORK = multiprocessing.get_context("fork")


class Result:
    """Exit codes of the ranks and what they printed."""

    def __init__(self, codes: list[int], output: str) -> None:
        self.codes, self.output = codes, output


class Running:
    """A stage that is under way."""

    def __init__(self, children: list[Any], log: Path, timeout: float) -> None:
        self._children, self._log = children, log
        self._deadline = time.monotonic() + timeout
        self.pids = [child.pid for child in children]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds; AssertionError when the stage ends before, or is late."""
        while not condition():
            alive = all(child.is_alive() for child in self._children) and time.monotonic() < self._deadline
            assert alive, self._log.read_text()
            time.sleep(0.005)

    def result(self) -> Result:
        """Wait for the end. When a rank has failed, the others have three seconds."""
        while any(child.is_alive() for child in self._children) and time.monotonic() < self._deadline:
            time.sleep(0.02)
            if any(child.exitcode for child in self._children):
                self._deadline = min(self._deadline, time.monotonic() + 3)
        for child in self._children:
            if child.is_alive():
                child.kill()
            child.join()
        return Result([child.exitcode for child in self._children], self._log.read_text())


def start_stage(
    module: str, options: list[str], folder: Path, ranks: int = 1, timeout: float = 180
) -> Running:
    """Start `module`.main with command line `options` on `ranks` processes; the log goes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{module}.{time.monotonic_ns()}.log"
    log.touch()
    port = _own_port()
    children = [
        FORK.Process(target=_rank, args=(module, options, log, rank, ranks, port), daemon=True)
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    return Running(children, log, timeout)


def _own_port() -> int:
    """Find a free port; those of two processes of pytest, which run at the same time, differ in parity."""
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while (port := free_port()) % 2 != process % 2:
        pass
    return port


def run_stage(module: str, options: list[str], folder: Path, ranks: int = 1, timeout: float = 180) -> Result:
    """Start a stage and wait for its end."""
    return start_stage(module, options, folder, ranks, timeout).result()


def succeed(module: str, options: list[str], folder: Path, ranks: int = 1) -> None:
    """Run a stage that must end well; shows its log otherwise."""
    result = run_stage(module, options, folder, ranks)
    assert result.codes == [0] * ranks, result.output


def _rank(module: str, options: list[str], log: Path, rank: int, ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [module, *options]
    torch.set_num_threads(1)
    multiprocessing.current_process().daemon = False  # so that it may have children of its own
    code = 0
    try:
        run_main(importlib.import_module(module).main)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:  # noqa: BLE001 - the end of the process
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)

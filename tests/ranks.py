"""Run a stage's `main` on some ranks by forking this process, which has the heavy imports done already.

The launcher takes five seconds per start, a fork a fraction of one; a few tests use the launcher all the
same.
"""

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401 - imported once, before the forks
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import peft  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401
import transformers  # noqa: F401

from common.process import run_main

FORK = multiprocessing.get_context("fork")


class Result:
    """Exit codes of the ranks and what they printed."""

    def __init__(self, codes: list[int], output: str) -> None:
        self.codes, self.output = codes, output


def run_stage(module: str, options: list[str], folder: Path, ranks: int = 1, timeout: float = 180) -> Result:
    """Run `module`.main with command line `options` on `ranks` processes; the log goes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{module}.{time.monotonic_ns()}.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        FORK.Process(target=_rank, args=(module, options, log, rank, ranks, port), daemon=True)
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + timeout
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
        if any(child.exitcode for child in children):  # one failed: the others wait for it for ever
            deadline = min(deadline, time.monotonic() + 3)
    for child in children:
        if child.is_alive():
            child.kill()
        child.join()
    return Result([child.exitcode for child in children], log.read_text())


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
    code = 0
    try:
        run_main(importlib.import_module(module).main)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)

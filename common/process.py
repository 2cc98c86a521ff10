"""How a rank begins and ends: exit codes, the first error, polite stops, and no waiting for the dead."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil
import torch.distributed as dist

from common.distributed import barrier, log, rank, sum_over_ranks
from common.options import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what people, Slurm and spot machines send
REFUSED = 2  # exit code after a mistake that the user can correct
STOPPED = 75  # exit code of a polite stop: the same command goes on from here (EX_TEMPFAIL of sysexits.h)
STOP_FILE = "stop"  # in the output directory: asks for a stop, from where no signal reaches the ranks
ONE_SIGNAL = (
    2.0  # seconds: Slurm and a terminal signal all processes at once, and the launcher its ranks again
)
GRACE = 5.0  # seconds that a rank waits for its own error after another rank of the machine has ended

_requested = False  # a stop, by a signal or because nobody watches the run any more
_finished = False


class Stopped(Exception):  # noqa: N818 - not an error
    """The run ends here because it was asked to; a checkpoint is written."""


def run_main(main: Callable[[], None]) -> None:
    """Run a stage, and exit with 0 at its end, REFUSED, STOPPED, or 1 after an unforeseen error.

    A user's mistake is one line. Under a launch script, which names a folder in $TRIPTYCH_ENDINGS, a rank
    notes there how it ended: the script shows the first traceback at the very end.
    """
    _listen()
    code = 0
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(REFUSED)
    except Stopped as stop:
        log(str(stop))
        _note("stopped", str(stop))
        code = STOPPED
    except Exception as error:  # noqa: BLE001 - the end of the process
        _report(error)
        _end(1)
    _leave(code)


def stop_requested(output_dir: str) -> bool:
    """Whether any rank was asked to stop: the same answer on all ranks, which must ask together."""
    global _requested
    if rank() == 0:
        for folder in filter(None, (output_dir, os.environ.get("TRIPTYCH_ENDINGS"))):
            if (Path(folder) / STOP_FILE).exists():
                (Path(folder) / STOP_FILE).unlink(missing_ok=True)
                _requested = True
    return sum_over_ranks(float(_requested))[0] > 0


def stop_before_training() -> None:
    """End this rank politely, if it was asked to, while there is nothing to save yet."""
    endings = os.environ.get("TRIPTYCH_ENDINGS")
    if _requested or (endings and (Path(endings) / STOP_FILE).exists()):
        raise Stopped("stopped before the first step, as asked; the same command begins again")


def _listen() -> None:
    """From here on a first signal asks the run to stop after its step; a second one ends it at once."""
    first = math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as Python calls it
        nonlocal first
        global _requested
        if time.monotonic() - first > ONE_SIGNAL:
            _end(128 + number)
        first = min(first, time.monotonic())
        _requested = True

    for number in SIGNALS:
        signal.signal(number, on_signal)
    _note(f"began_{rank()}", "")
    launcher = psutil.Process().parent()
    if launcher is not None and "deepspeed.launcher.launch" in launcher.cmdline():
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _watch(launcher: psutil.Process) -> None:
    """Ask for a stop when nobody is above this rank any more, and end it when another of the machine is gone.

    DeepSpeed's ranks would go on without a launcher, and wait in a collective for a dead rank until it times
    out.
    """
    global _requested
    # The launcher, and above it the `deepspeed` command, or a remote shell where there are several machines.
    watched = [launcher.pid, *(process.pid for process in launcher.parents()[:1])]
    if "TRIPTYCH_SUPERVISOR" in os.environ:
        watched.append(int(os.environ["TRIPTYCH_SUPERVISOR"]))
    peers: list[int] = []
    while not _finished and all(map(_is_alive, peers)):
        _requested = _requested or not all(map(_is_alive, watched))
        if not peers and dist.is_initialized():
            with contextlib.suppress(psutil.NoSuchProcess):
                peers = [child.pid for child in launcher.children() if child.pid != os.getpid()]
        time.sleep(0.5)
    time.sleep(GRACE)
    if not _finished:
        _note(f"lost_{rank()}", f"rank {rank()} ends, because another rank has ended\n")
        _end(1)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _leave(code: int) -> None:
    """The common end of all ranks."""
    global _finished
    barrier()  # so that no rank is seen to be gone while another has work to do
    _finished = True
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the launcher ends the ranks that are a moment slower
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def _report(error: Exception) -> None:
    text = "".join(traceback.format_exception(error))
    # An error of the connection to another rank that has failed is not the one that matters.
    is_echo = isinstance(error, dist.DistError) or "gloo" in str(error)
    kind = "lost" if is_echo and "timed out" not in str(error).lower() else "failed"
    if _note(f"{kind}_{rank()}", f"rank {rank()}: {text}"):
        text = f"rank {rank()}: {'lost contact with another rank' if kind == 'lost' else 'failed'}\n"
    with contextlib.suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


def _note(name: str, text: str) -> bool:
    """Tell the launch script how this rank ended, if there is one that listens."""
    folder = os.environ.get("TRIPTYCH_ENDINGS")
    try:
        return bool(folder) and (Path(folder) / name).write_text(text) >= 0
    except OSError:
        return False


def _end(code: int) -> None:
    """Leave without a farewell to a process group that may be broken."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)

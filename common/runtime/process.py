"""Rank lifecycle: exit codes, first-error reporting, graceful shutdown, dead-peer detection."""

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
import torch
import torch.distributed as dist

from common.runtime.distributed import barrier, on_cpu, rank, ranks_in_words, sum_over_ranks
from common.runtime.options import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what people, Slurm and spot machines send
WAKE = signal.SIGURG  # from the watching thread to the main one; nothing else sends or heeds it
REFUSED = 2  # exit code after a mistake that the user can correct
STOPPED = 75  # exit code of a polite stop: the same command resumes (EX_TEMPFAIL of sysexits.h)
STOP_FILE = "stop"  # in the output directory: asks for a stop, from where no signal reaches the ranks
ONE_SIGNAL = (
    2.0  # seconds: Slurm and a terminal signal all processes at once, and the launcher its ranks again
)
GRACE = 5.0  # seconds that a rank waits for its own error after another rank of the machine has ended
CLEAN_UP = 20.0  # seconds that an interrupted rank may take to remove temporary files
PREPARING = "Stopped during preparation; nothing to save. Run the same command to start again."
UNWRITTEN = "Stopped; no results were written. Run the same command to start again."

_requested = False  # a stop, by a signal or because nobody watches the run any more
_finished = False
_last_line: str | None = PREPARING  # of a stop at any moment; None: a stop waits for `stop_requested`
_undo: list[Callable[[], None]] = []  # what a refusal takes back


class Stopped(BaseException):
    """The run was asked to stop, and all ranks end together. Like KeyboardInterrupt, it is no Exception."""


class Interrupted(Stopped):
    """This rank ends wherever it is, because a stop loses nothing."""


def run_main(main: Callable[[], None]) -> None:
    """Run a stage, and exit with 0 at its end, REFUSED, STOPPED, or 1 after an unforeseen error.

    A user's mistake is one line. Under a launch script, which names a folder in $TRIPTYCH_ENDINGS, a rank
    notes there how it ended, and the script shows that line, or the first traceback, at the very end.
    """
    _listen()
    try:
        main()
        stop_between_steps()
    except UserError as error:
        stop_between_steps()
        _refuse(error)
    except Interrupted as stop:
        _show_last("stopped", str(stop))
        _end(STOPPED)
    except Stopped as stop:
        stop_between_steps()
        _show_last("stopped", str(stop))
        _leave(STOPPED)
    except Exception as error:  # noqa: BLE001 - the end of the process
        _report(error)
        _end(1)
    else:
        _leave(0)


def stop_anywhere(line: str = PREPARING) -> None:
    """From here on a stop ends this rank wherever it is, with this line: nothing that was done is lost.

    The state at the start of a process.
    """
    global _last_line
    _last_line = line
    if _requested:
        _interrupt()


def stop_between_steps() -> None:
    """From here on a stop waits until all ranks call `stop_requested`, which is after a step of training."""
    global _last_line
    _last_line = None


def stop_requested(output_dir: str) -> bool:
    """Whether any rank was asked to stop: the same answer on all ranks, which must ask together."""
    global _requested
    if rank() == 0:
        for folder in filter(None, (output_dir, os.environ.get("TRIPTYCH_ENDINGS"))):
            if (Path(folder) / STOP_FILE).exists():
                (Path(folder) / STOP_FILE).unlink(missing_ok=True)
                _requested = True
    return sum_over_ranks(float(_requested))[0] > 0


def accept() -> None:
    """Tell the launch script that the options and data are accepted: it begins to write the log."""
    if rank() == 0 and "TRIPTYCH_ENDINGS" in os.environ:
        name = (
            f"CPU, {torch.get_num_threads()} threads per rank" if on_cpu() else torch.cuda.get_device_name()
        )
        _note("accepted", f"{name}; {ranks_in_words()}")


def on_refusal(undo: Callable[[], None]) -> None:
    """Have rank 0 call this if the command is refused."""
    _undo.append(undo)


def _refuse(error: UserError) -> None:
    if rank() == 0:
        for undo in _undo:
            with contextlib.suppress(OSError):
                undo()
    if not _note(f"refused_{rank()}", f"error: {error}") and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(REFUSED)


def _listen() -> None:
    """A first signal asks for a stop, a second one ends the process at once."""
    first = math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as Python calls it
        nonlocal first
        global _requested
        if time.monotonic() - first > ONE_SIGNAL:
            _end(128 + number)
        first = min(first, time.monotonic())
        _requested = True
        _interrupt()

    for number in SIGNALS:
        signal.signal(number, on_signal)
    signal.signal(WAKE, lambda *_: _interrupt())
    _note(f"began_{rank()}", "")
    launcher = psutil.Process().parent()
    if launcher is not None and "deepspeed.launcher.launch" in launcher.cmdline():
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def _interrupt() -> None:
    """Raise Interrupted, once, if a stop loses nothing. Code that swallows it gets CLEAN_UP seconds."""
    global _last_line
    if _last_line is None:
        return
    line, _last_line = _last_line, None
    timer = threading.Timer(CLEAN_UP, lambda: _show_last("stopped", line) or _end(STOPPED))
    timer.daemon = True
    timer.start()
    raise Interrupted(line)


def _watch(launcher: psutil.Process) -> None:
    """Ask for a stop when the script wants one or nobody is above this rank any more, and end this rank when
    another one of the machine is gone.

    DeepSpeed's ranks would go on without a launcher, and wait in a collective for a dead rank until it times
    out.
    """
    global _requested
    # The launcher, and above it the `deepspeed` command, or a remote shell where there are several machines.
    watched = [launcher.pid, *(process.pid for process in launcher.parents()[:1])]
    if "TRIPTYCH_SUPERVISOR" in os.environ:
        watched.append(int(os.environ["TRIPTYCH_SUPERVISOR"]))
    endings = os.environ.get("TRIPTYCH_ENDINGS")
    peers: list[int] = []
    while not _finished and all(map(_is_alive, peers)):
        is_asked = bool(endings) and (Path(endings) / STOP_FILE).exists()
        _requested = _requested or is_asked or not all(map(_is_alive, watched))
        if _requested and _last_line is not None:
            signal.pthread_kill(threading.main_thread().ident, WAKE)
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


def _show_last(kind: str, line: str) -> None:
    """Leave the last line of the command to the launch script; without one, print it."""
    if not _note(f"{kind}_{rank()}", line) and rank() == 0:
        with contextlib.suppress(OSError):
            print(line, flush=True)


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

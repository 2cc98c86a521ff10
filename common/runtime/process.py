"""Rank lifecycle: exit codes, first-error reporting, graceful shutdown, dead-peer detection."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil
import torch.distributed as dist

from common.runtime.contact import Contact, keep_contact
from common.runtime.distributed import barrier, hardware, is_lost_contact, rank, sum_over_ranks, use_own_gpu
from common.runtime.launcher import guardians, is_alive, launcher, note
from common.runtime.options import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # sent by users, Slurm and spot instances
WAKE = signal.SIGURG  # from the watcher thread to the main thread; otherwise unused
REFUSED = 2  # exit code after a UserError
STOPPED = 75  # exit code of a graceful stop: the same command resumes (EX_TEMPFAIL of sysexits.h)
STOP_FILE = "stop"  # in the output directory: requests a stop where signals do not reach the ranks
ONE_SIGNAL = 2.0  # seconds: one stop may arrive twice, from Slurm or a terminal and from the launcher
GRACE = 5.0  # seconds for a rank to report its own error after another local rank has ended
CLEAN_UP = 20.0  # seconds for an interrupted rank to remove temporary files
PREPARING = "Stopped during preparation; nothing to save. Run the same command to start again."
UNWRITTEN = "Stopped; no results were written. Run the same command to start again."

_exit_now = os._exit  # a reward function runs with another one
_requested = False  # a stop: by a signal, by STOP_FILE, or because the launcher is gone
_finished = False
_last_line: str | None = PREPARING  # printed by an immediate stop; None: a stop waits for `stop_requested`
_undo: list[Callable[[], None]] = []  # called after a UserError
_contact: Contact | None = None  # with the ranks of other nodes


class Stopped(BaseException):
    """A requested stop of all ranks. Like KeyboardInterrupt, it is not an Exception."""


class Interrupted(Stopped):
    """Immediate stop of this rank, raised where no work is lost."""


def run_main(main: Callable[[], None]) -> None:
    """Run a stage. Exit code: 0, REFUSED after a UserError, STOPPED after a stop, 1 after any other error.

    A UserError prints one line. Launch scripts set $TRIPTYCH_ENDINGS to a folder: each rank writes there how
    it ended, and the script prints that line, or the first traceback, last.
    """
    warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves; users cannot act on them
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    global _contact
    try:
        _listen()  # a signal may come at once
        use_own_gpu()
        _contact = keep_contact(_end_lost)
        main()
        stop_between_steps()
    except UserError as error:
        stop_between_steps()
        _show_refusal(error)
        sys.exit(REFUSED)
    except Interrupted as stop:
        _show_last("stopped", str(stop))
        _tell_nodes("stopped")
        _end(STOPPED)
    except Stopped as stop:
        stop_between_steps()
        _show_last("stopped", str(stop))
        _leave(STOPPED)
    except Exception as error:  # noqa: BLE001 - the end of the process
        is_missing = isinstance(error, FileNotFoundError)  # more likely an error of ours
        if isinstance(error, OSError) and error.filename and not is_missing:  # a full disk, no permission
            _show_refusal(UserError(f"{error.filename}: {error.strerror}"))
            _end(REFUSED)
        _report(error)
        _end(1)
    else:
        _leave(0)


def stop_anywhere(line: str = PREPARING) -> None:
    """From now on, a stop ends this rank immediately and prints this line. The default of a process.

    Use it while an immediate end loses no work.
    """
    global _last_line
    _last_line = line
    if _requested:
        _interrupt()


def stop_between_steps() -> None:
    """From now on, a stop waits until all ranks call `stop_requested`, after a training step."""
    global _last_line
    _last_line = None


def stop_requested(output_dir: str) -> bool:
    """Whether a stop was requested on any rank. A collective: all ranks must call it."""
    global _requested
    if rank() == 0:
        for folder in filter(None, (output_dir, os.environ.get("TRIPTYCH_ENDINGS"))):
            if (Path(folder) / STOP_FILE).exists():
                (Path(folder) / STOP_FILE).unlink(missing_ok=True)
                _requested = True
    return sum_over_ranks(float(_requested))[0] > 0


def report_accepted() -> None:
    """Tell the launch script that options and data are accepted, so that it starts the log file."""
    if rank() == 0 and "TRIPTYCH_ENDINGS" in os.environ:
        note("accepted", hardware())


def on_refusal(undo: Callable[[], None]) -> None:
    """Register a function that rank 0 calls after a UserError."""
    _undo.append(undo)


def _show_refusal(error: UserError) -> None:
    if rank() == 0:
        for undo in _undo:
            with contextlib.suppress(OSError):
                undo()
    if not note(f"refused_{rank()}", f"error: {error}") and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    _tell_nodes(f"error: {error}")


def _listen() -> None:
    """Handle signals: the first requests a stop, a second one ends the process at once."""
    first = math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signature of a signal handler
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
    note(f"began_{rank()}", "")
    if process := launcher():
        threading.Thread(target=_watch, args=(process,), daemon=True).start()


def _interrupt() -> None:
    """Raise Interrupted once, where a stop may be immediate. End the process after CLEAN_UP seconds."""
    global _last_line
    if _last_line is None:
        return
    line, _last_line = _last_line, None
    timer = threading.Timer(CLEAN_UP, lambda: _show_last("stopped", line) or _end(STOPPED))
    timer.daemon = True
    timer.start()
    raise Interrupted(line)


def _watch(launcher: psutil.Process) -> None:
    """Request a stop for STOP_FILE or a dead launcher. End this rank when another local rank has died.

    Without it, ranks of DeepSpeed outlive their launcher, and wait for a dead rank until a collective times
    out.
    """
    global _requested
    watched = guardians(launcher)
    endings = os.environ.get("TRIPTYCH_ENDINGS")
    peers: list[int] = []
    while not _finished and all(map(is_alive, peers)):
        has_stop_file = bool(endings) and (Path(endings) / STOP_FILE).exists()
        _requested = _requested or has_stop_file or not all(map(is_alive, watched))
        if _requested and _last_line is not None:
            signal.pthread_kill(threading.main_thread().ident, WAKE)
        if not peers and dist.is_initialized():
            with contextlib.suppress(psutil.NoSuchProcess):
                peers = [child.pid for child in launcher.children() if child.pid != os.getpid()]
        time.sleep(0.5)
    if not _finished:
        _tell_nodes("stopped because another rank of its node has ended")
    _end_lost(f"rank {rank()}: stopped because another rank has ended")


def _end_lost(line: str) -> None:
    """End this rank after the loss of another one, unless its own end comes first."""
    time.sleep(GRACE)
    if not _finished:
        if not note(f"lost_{rank()}", f"{line}\n"):
            print(line, file=sys.stderr, flush=True)
        _end(1)


def _tell_nodes(line: str) -> None:
    if _contact:
        _contact.report(line)


def _leave(code: int) -> None:
    """End all ranks together."""
    global _finished
    barrier()  # no rank may disappear while another is still working
    _finished = True
    if _contact:
        _contact.close()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the launcher signals ranks that are a moment slower
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def _report(error: Exception) -> None:
    is_lost = is_lost_contact(error) and "timed out" not in str(error).lower()
    text = f"rank {rank()}: {''.join(traceback.format_exception(error))}"
    if is_lost and _contact and (line := _contact.failure()):
        text = f"{line}\n"
    if note(f"{'lost' if is_lost else 'failed'}_{rank()}", text):
        text = f"rank {rank()}: {'lost contact with another rank' if is_lost else 'failed'}\n"
    with contextlib.suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)
    if not is_lost:
        _tell_nodes(traceback.format_exception_only(error)[-1].strip())


def _show_last(kind: str, line: str) -> None:
    """Pass the last line to the launch script; print it if there is none."""
    if not note(f"{kind}_{rank()}", line) and rank() == 0:
        with contextlib.suppress(OSError):
            print(line, flush=True)


def _end(code: int) -> None:
    """Exit at once: the process group may be broken."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    _exit_now(code)

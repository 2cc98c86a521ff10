"""Run `deepspeed` for a launch script: one log, graceful stops, no orphans, and the reason in the last line.

    python launch/lib/supervise.py OUTPUT_DIR SCRIPT deepspeed ... --module NAME OPTIONS

The first SIGTERM, SIGINT or SIGUSR1 asks the ranks to stop, a second one kills them. Exit codes: 0; 2 after a
mistake of the user; 75 after a stop, when the same command resumes; 1 after any other error.
"""

import contextlib
import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

REFUSED, STOPPED = 2, 75  # as in common/runtime/process.py, which takes seconds to import
ONE_SIGNAL = 2.0  # seconds within which signals count as one: a terminal signals all processes
ORPHAN_SECONDS = 3600.0  # for the checkpoint of the ranks after `deepspeed` itself was killed
UNBEGUN = "Stopped during preparation; nothing to save. Run the same command to start again.\n"
KILLED = "Killed by a second signal; progress since the last checkpoint is lost.\n"
ROOT = Path(__file__).resolve().parents[2]
# DeepSpeed's line about a rank that exited. It is hidden: our last line says this, with the reason.
LAUNCHER_LINE = re.compile(rb"\[launch\.py:\d+:sigkill_handler\].* exits with return code = (-?\d+)")


def main() -> int:
    output, script, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    with tempfile.TemporaryDirectory() as folder:
        endings = Path(folder)
        environment = {**os.environ, "TRIPTYCH_ENDINGS": folder, "TRIPTYCH_SUPERVISOR": str(os.getpid())}
        # Slurm signals all processes; `deepspeed`, which inherits this, would die of it.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        signals = listen(endings, partial(kill, child))
        threading.Thread(target=_end_orphans, args=(child,), daemon=True).start()
        if hosts := os.environ.get("TRIPTYCH_HOSTS"):
            threading.Thread(target=_follow, args=(child, Path(hosts), signals), daemon=True).start()
        log, rank_code = Log(output, endings / "accepted", typed(script, command)), None
        for line in child.stdout:
            if match := LAUNCHER_LINE.search(line):
                rank_code = int(match[1])
            else:
                log.write(line)
        code = child.wait()
        code, last = ending(endings, code if rank_code is None else rank_code, len(signals))
        if code not in (0, REFUSED, STOPPED):
            if os.environ.get("NODE_RANK", "0") == "0":
                log.open()  # nodes share the folder
            last += f"Failed with exit code {code}{f'; log: {log.path}' if log.is_open else ''}\n"
        log.write(last.encode())
        log.close(is_refused=code == REFUSED)
    return code


class Log:
    """Writes lines to the terminal and, once the command is accepted, to OUTPUT_DIR/train.log."""

    def __init__(self, folder: Path, accepted: Path, command: str) -> None:
        self.path = folder / "train.log"
        self._accepted, self._command = accepted, command
        self._waiting: list[bytes] = []  # lines before the command was accepted
        self._file = None
        self._missing = [path for path in (folder, *folder.parents) if not path.exists()]
        self._before = names(folder)

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def write(self, line: bytes) -> None:
        """Write a line. Errors of terminal and disk are ignored."""
        with contextlib.suppress(OSError):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        self._waiting.append(line)
        if self._accepted.exists():
            self.open()

    def open(self) -> None:
        """Open the file, append to an earlier one, and write the waiting lines."""
        with contextlib.suppress(OSError):
            if not self.is_open:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab")
                self._file.write(self._header().encode())
            self._file.write(b"".join(self._waiting))
            self._file.flush()
            self._waiting.clear()

    def close(self, is_refused: bool) -> None:
        """Close the file. After a refusal, remove it and its folder if both are new and contain nothing else:
        a refusal after hours of training keeps its log.
        """
        with contextlib.suppress(OSError):
            if self.is_open:
                self._file.close()
            if is_refused:
                if self.is_open and names(self.path.parent) - self._before - {"run.lock"} == {self.path.name}:
                    self.path.unlink()
                for folder in self._missing:
                    folder.rmdir()  # fails unless it is empty

    def _header(self) -> str:
        device = self._accepted.read_text() if self._accepted.exists() else "unknown"
        return (
            f"=== {time.strftime('%Y-%m-%d %H:%M:%S %z')}\ncommand: {self._command}\nversions: {versions()}\n"
            f"device: {device}\n"
        )


def names(folder: Path) -> set[str]:
    """Names of the files in a folder; none without the folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def typed(script: str, command: Sequence[str]) -> str:
    """The command line of the script, as the user typed it."""
    options = command[command.index("--module") + 2 :] if "--module" in command else command
    return shlex.join(["bash", script, *options])


def versions() -> str:
    """Versions of Python, of the libraries that affect results, and the commit if there is one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    names = [f"python {sys.version.split()[0]}"]
    for name in ("torch", "deepspeed", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            names.append(f"{name} {version(name)}")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (ROOT / ".git").exists():
            commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
            names.append(f"triptych {commit.stdout.strip()}")
    return ", ".join(names)


def ending(endings: Path, code: int, signals: int) -> tuple[int, str]:
    """The exit code and the last output: one line, or the traceback of the rank that failed first.

    code: of the rank that `deepspeed` reports, or its own. signals: number of requests to stop.
    """
    notes: dict[str, list[Path]] = {kind: [] for kind in ("began", "stopped", "refused", "failed", "lost")}
    for path in endings.glob("*_*"):
        notes[path.name.split("_")[0]].append(path)
    ranks = {kind: {path.name.split("_")[1] for path in paths} for kind, paths in notes.items()}
    silent = sorted(ranks["began"] - ranks["stopped"] - ranks["lost"], key=int)
    error_code = code if 0 < code < 128 else 1
    if signals and not notes["began"]:
        return STOPPED, UNBEGUN
    if notes["failed"]:
        return error_code, f"\nThe first error:\n{_first(notes['failed'])}"
    if notes["refused"]:
        return REFUSED, f"{min(notes['refused']).read_text()}\n"
    # When one rank was killed, `deepspeed` asks the others to stop: silent ranks mean a failure.
    if notes["stopped"] and not silent:
        return STOPPED, f"{min(notes['stopped']).read_text()}\n"
    if signals > 1:
        return 1, KILLED
    if notes["lost"] and not silent:
        return error_code, f"\nThe first error:\n{_first(notes['lost'])}"
    if code < 0 or notes["lost"] or notes["stopped"]:
        who = f"Rank {' or '.join(silent)}" if silent else "A rank"
        reason = f"signal {-code}" if code < 0 else "no error message"
        return (
            error_code,
            f"\n{who} was killed ({reason}): by another process, out of memory, or an NCCL timeout.\n",
        )
    return (0 if code == 0 else error_code), ""


def _first(notes: Sequence[Path]) -> str:
    return min(notes, key=lambda path: path.stat().st_mtime_ns).read_text()


def listen(folder: Path, end: Callable[[], None]) -> list[float]:
    """Install signal handlers. The times of the signals are appended to the returned list.

    The first signal creates the file `stop` in the folder if a `began_*` is there. Otherwise, and after a
    second one, `end` is called.
    """
    counted: list[float] = []

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as Python calls it
        now = time.monotonic()
        if now - min(counted, default=-math.inf) <= ONE_SIGNAL:
            return
        counted.append(now)
        if len(counted) > 1 or not any(folder.glob("began_*")):
            end()  # ranks that are still importing have nothing to save
            return
        with contextlib.suppress(OSError):
            (folder / "stop").touch()
        with contextlib.suppress(OSError):
            os.write(1, b"stopping; a second signal kills the run\n")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, on_signal)
    return counted


def _end_orphans(child: subprocess.Popen) -> None:
    """Kill ranks that outlive `deepspeed`, after time for a checkpoint. They keep its output open."""
    child.wait()
    time.sleep(ORPHAN_SECONDS)
    kill(child)


def _follow(child: subprocess.Popen, hosts: Path, signals: list[float]) -> None:
    """On a host of HOSTFILE, act on signals to the first machine, and stop when standard input ends: then the
    connection is lost.
    """
    is_connected, is_asked = True, False
    while not (hosts / "kill").exists():
        if is_connected and select.select([0], [], [], 0.5)[0]:
            is_connected = bool(os.read(0, 1))
        elif not is_connected:
            time.sleep(0.5)
        if not is_asked and (not is_connected or (hosts / "stop").exists()):
            is_asked = True
            os.kill(os.getpid(), signal.SIGTERM)
    signals.append(time.monotonic())
    kill(child)


def kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

"""Run `deepspeed` on behalf of a launch script: one log, polite stops, no orphans, the first error last.

    python launch/supervise.py OUTPUT_DIR deepspeed ...

A first SIGTERM, SIGINT or SIGUSR1 asks the ranks to stop after their step, a second one kills them. Exits
with the ranks' code: 0, 2 for a mistake of the user, 75 for a stop from which the same command goes on.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

REFUSED, STOPPED = 2, 75  # as in common/process.py, which takes seconds to import
ONE_SIGNAL = 2.0  # seconds within which signals count as one: a terminal sends them to all processes
ORPHANS_MAY_TAKE = 600.0  # seconds that ranks have for their checkpoint when `deepspeed` itself was killed


def main() -> int:
    output, command = Path(sys.argv[1]), sys.argv[2:]
    with contextlib.suppress(OSError):
        output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as endings:
        # Ranks on other machines see the output directory alone.
        stop_files = [Path(folder) / "stop" for folder in [endings, *[output] * ("--hostfile" in command)]]
        environment = {**os.environ, "TRIPTYCH_ENDINGS": endings, "TRIPTYCH_SUPERVISOR": str(os.getpid())}
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        _listen(child, stop_files)
        with Log(output / "train.log") as log:
            threading.Thread(target=_end_orphans, args=(child,), daemon=True).start()
            for line in child.stdout:
                log.write(line)
            code = child.wait()
            if (Path(endings) / "stopped").exists():
                return STOPPED
            log.write(_first_error(Path(endings), code).encode())
    return code if 0 <= code < 128 else 1


class Log:
    """Lines to the terminal and to a file, as long as these take them."""

    def __init__(self, path: Path) -> None:
        self._files = [sys.stdout.buffer]
        with contextlib.suppress(OSError):
            self._files.append(path.open("ab"))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files[1:]:
            with contextlib.suppress(OSError):
                file.close()

    def write(self, line: bytes) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                file.write(line)
                file.flush()


def _listen(child: subprocess.Popen, stop_files: list[Path]) -> None:
    first = math.inf

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as Python calls it
        nonlocal first
        if time.monotonic() - first > ONE_SIGNAL:
            _kill(child)
        elif first == math.inf:
            first = time.monotonic()
            for file in stop_files:
                with contextlib.suppress(OSError):
                    file.touch()
            with contextlib.suppress(OSError):
                os.write(1, b"stopping after this step; a second signal ends the run at once\n")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, on_signal)


def _end_orphans(child: subprocess.Popen) -> None:
    """Ranks outlive a killed `deepspeed`, whose output then does not end; they notice, and have some time."""
    child.wait()
    time.sleep(ORPHANS_MAY_TAKE)
    _kill(child)


def _kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _first_error(endings: Path, code: int) -> str:
    """The traceback of the rank that failed first, or which rank died without leaving one."""
    failed = sorted(endings.glob("failed_*"), key=lambda path: path.stat().st_mtime_ns)
    if failed:
        return f"\nthe first error:\n{failed[0].read_text()}"
    names = {
        kind: {path.name.split("_")[1] for path in endings.glob(f"{kind}_*")} for kind in ("began", "lost")
    }
    silent = sorted(names["began"] - names["lost"], key=int)
    if code in (0, REFUSED) or not names["lost"]:
        return ""
    if not silent:
        lost = min(endings.glob("lost_*"), key=lambda path: path.stat().st_mtime_ns)
        return f"\nthe first error:\n{lost.read_text()}"
    return f"\nrank {' or '.join(silent)} died without a word: killed from outside, or out of memory\n"


if __name__ == "__main__":
    sys.exit(main())

"""End of a process: immediate stops, stops between steps, second signals, user errors."""

import contextlib
import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from common.runtime import process
from common.runtime.options import UserError
from common.runtime.process import (
    REFUSED,
    STOPPED,
    UNWRITTEN,
    stop_anywhere,
    stop_between_steps,
    stop_requested,
)
from step3_ppo.reward_functions import function_scores, load_functions
from tests.ranks import FORK


class Child:
    """A process that calls `run_main`, and its output."""

    def __init__(self, main, folder: Path) -> None:
        self.begun, self.log = folder / "begun", folder / "log"
        self._process = FORK.Process(target=self._run, args=(main,))
        self._process.start()

    def _run(self, main) -> None:
        descriptor = os.open(self.log, os.O_CREAT | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        os.environ.pop("TRIPTYCH_ENDINGS", None)
        try:
            process.run_main(main)
        except SystemExit as end:
            os._exit(end.code)

    def signal(self, number: int) -> None:
        deadline = time.monotonic() + 60
        while not self.begun.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(self._process.pid, number)

    def end(self, seconds: float) -> tuple[int, list[str]]:
        """Exit code and lines, within some seconds."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "still alive"
        return self._process.exitcode, self.log.read_text().splitlines()


def test_stop_while_handlers_are_installed(tmp_path, monkeypatch):
    """The launch script asks a rank to stop as soon as it has noted that it began."""
    note = process.note

    def signalled(name: str, text: str) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return note(name, text)

    with monkeypatch.context() as patched:
        patched.setattr(process, "note", signalled)
        code, lines = Child(lambda: None, tmp_path).end(10)
    assert code == STOPPED and lines == [process.PREPARING]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_ends_a_long_call_at_once(tmp_path: Path, number: int) -> None:
    """Also within code that catches every exception."""
    removed = tmp_path / "removed"

    def main() -> None:
        stop_anywhere(UNWRITTEN)
        try:
            with contextlib.suppress(Exception):
                (tmp_path / "begun").touch()
                time.sleep(60)
        finally:
            removed.touch()

    child = Child(main, tmp_path)
    child.signal(number)
    assert child.end(10) == (STOPPED, [UNWRITTEN])
    assert removed.exists()


def write_slow_function(folder: Path) -> None:
    (folder / "slow.py").write_text(
        "import pathlib, time\ndef slow(prompts, responses, records):\n"
        f"    pathlib.Path({str(folder / 'begun')!r}).touch()\n    time.sleep(60)\n"
    )


def test_stop_within_a_reward_function_is_not_its_error(tmp_path: Path) -> None:
    write_slow_function(tmp_path)

    def main() -> None:
        functions = load_functions([f"{tmp_path}/slow.py:slow"], "reward_function")
        function_scores(functions, ["p"], ["r"], [{}])

    child = Child(main, tmp_path)
    child.signal(signal.SIGTERM)
    assert child.end(10) == (STOPPED, [process.PREPARING])


def test_a_second_signal_within_a_reward_function_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "ONE_SIGNAL", 0.05)
    write_slow_function(tmp_path)

    def main() -> None:
        stop_between_steps()
        functions = load_functions([f"{tmp_path}/slow.py:slow"], "reward_function")
        function_scores(functions, ["p"], ["r"], [{}])

    child = Child(main, tmp_path)
    child.signal(signal.SIGTERM)
    time.sleep(0.5)
    child.signal(signal.SIGTERM)
    assert child.end(10)[0] == 128 + signal.SIGTERM


def test_stop_in_training_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    def main() -> None:
        stop_between_steps()
        (tmp_path / "begun").touch()
        for step in range(1, 1000):
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                time.sleep(0.01)
            if stop_requested(""):
                raise process.Stopped(f"Stopped at step {step}")

    child = Child(main, tmp_path)
    child.signal(signal.SIGTERM)
    assert child.end(30) == (STOPPED, ["Stopped at step 1"])


def test_stop_requested_in_training_ends_later_work_at_once(tmp_path: Path) -> None:
    def main() -> None:
        stop_between_steps()
        (tmp_path / "begun").touch()
        while not process._requested:
            time.sleep(0.01)
        stop_anywhere("Stopped after training")
        print("not reached")

    child = Child(main, tmp_path)
    child.signal(signal.SIGTERM)
    assert child.end(10) == (STOPPED, ["Stopped after training"])


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "ONE_SIGNAL", 0.05)

    def main() -> None:
        stop_between_steps()
        (tmp_path / "begun").touch()
        time.sleep(60)

    child = Child(main, tmp_path)
    child.signal(signal.SIGTERM)
    time.sleep(0.5)
    child.signal(signal.SIGTERM)
    assert child.end(10)[0] == 128 + signal.SIGTERM


def test_code_that_suppresses_a_stop_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CLEAN_UP", 0.3)

    def main() -> None:
        with contextlib.suppress(BaseException):
            (tmp_path / "begun").touch()
            time.sleep(60)
        time.sleep(60)

    child = Child(main, tmp_path)
    child.signal(signal.SIGTERM)
    assert child.end(10) == (STOPPED, [process.PREPARING])


def test_user_error_is_one_line_and_undoes_earlier_steps(tmp_path: Path) -> None:
    def main() -> None:
        (tmp_path / "begun").touch()
        process.on_refusal((tmp_path / "begun").unlink)
        raise UserError("--seed x: must be a number")

    assert Child(main, tmp_path).end(30) == (REFUSED, ["error: --seed x: must be a number"])
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize(
    "error, code, line",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"),
            REFUSED,
            "error: metrics.jsonl: No",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "rows"), 1, "FileNotFoundError: "),
    ],
)
def test_a_full_disk_is_one_line_and_a_missing_file_has_a_traceback(
    tmp_path: Path, error: OSError, code: int, line: str
) -> None:
    def main() -> None:
        raise error

    end, lines = Child(main, tmp_path).end(30)
    assert end == code and lines[-1].startswith(line)
    assert (len(lines) > 1) == (code == 1)

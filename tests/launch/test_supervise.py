"""A host of HOSTFILE: requests to stop from the first machine, and the end of its connection."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# As a rank: takes a stop within a second, or never.
RANK = """
import os, pathlib, sys, time
endings = pathlib.Path(os.environ["TRIPTYCH_ENDINGS"])
(endings / "began_0").touch()
print("began", flush=True)
while sys.argv[1] == "deaf" or not (endings / "stop").exists():
    time.sleep(0.1)
(endings / "stopped_0").write_text("Stopped at step 1.")
sys.exit(75)
"""


class Host:
    """supervise.py, whose standard input is the connection, and the shared folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.shared, self.log = folder / "shared", folder / "log"
        self.shared.mkdir()
        (folder / "rank.py").write_text(RANK)
        words = [sys.executable, REPOSITORY / "launch/lib/supervise.py", folder / "out", "step.sh"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*words, sys.executable, folder / "rank.py", kind], stdin=subprocess.PIPE, stdout=log,
                stderr=log, env={**os.environ, "TRIPTYCH_HOSTS": str(self.shared), "NODE_RANK": "0"},
            )  # fmt: skip
        self.wait_for("began")

    def wait_for(self, line: str) -> None:
        end = time.monotonic() + 30
        while line not in self.log.read_text():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def end(self) -> tuple[int, list[str]]:
        """Exit code and lines; the log is complete, because no rank is left."""
        return self.process.wait(30), self.log.read_text().splitlines()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Host]]:
    hosts: list[Host] = []

    def start(kind: str) -> Host:
        hosts.append(Host(tmp_path, kind))
        return hosts[-1]

    yield start
    hosts[0].process.kill()


def test_request_of_the_first_machine_stops_the_ranks(start: Callable[[str], Host]) -> None:
    host = start("listens")
    (host.shared / "stop").touch()
    code, lines = host.end()
    assert (code, lines[-1]) == (75, "Stopped at step 1.")


def test_lost_connection_stops_the_ranks(start: Callable[[str], Host]) -> None:
    host = start("listens")
    host.process.stdin.close()
    code, lines = host.end()
    assert (code, lines[-1]) == (75, "Stopped at step 1.")


def test_second_signal_to_the_first_machine_kills_the_ranks(start: Callable[[str], Host]) -> None:
    """Within seconds of the first one or not, and with a connection or without one."""
    host = start("deaf")
    host.process.stdin.close()
    host.wait_for("stopping")
    (host.shared / "kill").touch()
    code, lines = host.end()
    assert code == 1 and "Killed by a second signal; progress since the last checkpoint is lost." in lines

"""Several nodes: two network namespaces with their own addresses and host names, on this machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.ranks import succeed
from tests.stages import ppo, reward, sft, timeless

NAMES = ("triptych-node0", "triptych-node1")
NETWORK = "10.213.7."
# Enters a node with an empty environment, as a shell of ssh does.
SSH = f"""#!/bin/bash
if [ "$1" = -G ]; then echo "hostname {NETWORK}$((${{2#host}} + 1))"; exit; fi
for word; do
    shift
    [[ "$word" == host? ]] && node="${{word#host}}" && break
done
setsid ip netns exec triptych-node$node unshare -u env -i HOME=/ PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
    sh -c "hostname host$node && $*"
"""
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare"))), reason="needs root, ip and unshare"
)


class Nodes:
    """Two nodes; each starts the same script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[int, subprocess.Popen] = {}

    def start(self, node: int, script: str, words: list[str], **variables: str) -> None:
        command = f'hostname host{node} && exec bash {REPOSITORY}/launch/{script} "$@"'
        own = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": f"{NETWORK}1", "NUM_GPUS": "1"}
        with self.log(node).open("w") as log:
            self.processes[node] = subprocess.Popen(
                ["ip", "netns", "exec", NAMES[node], "unshare", "-u", "bash", "-c", command, "bash", *words],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0", **own, **variables},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def start_hosts(self, words: list[str]) -> subprocess.Popen:
        """Start the script on both from outside, in the folder of the test. The log is that of node 0."""
        tools = self.folder / "tools"
        tools.mkdir(exist_ok=True)
        (tools / "ssh").write_text(SSH)
        (tools / "ssh").chmod(0o755)
        (self.folder / "hosts").write_text("host0 slots=1\nhost1 slots=1\n")
        own = {"HOSTFILE": "hosts", "GLOO_SOCKET_IFNAME": "eth0", "PATH": f"{tools}:{os.environ['PATH']}"}
        with self.log(0).open("w") as log:
            return subprocess.Popen(
                ["bash", f"{REPOSITORY}/launch/step1_sft.sh", *words], cwd=self.folder,
                env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def log(self, node: int) -> Path:
        return self.folder / f"node{node}.log"

    def text(self, node: int) -> str:
        return self.log(node).read_text()

    def pids(self, node: int) -> list[int]:
        done = subprocess.run(
            ["ip", "netns", "pids", NAMES[node]], capture_output=True, text=True, check=False
        )
        return [int(word) for word in done.stdout.split()]

    def rank(self, node: int) -> int:
        """The process of the rank on a node."""
        for pid in self.pids(node):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "-m" in words and words[words.index("-m") + 1].endswith(".main"):
                    return pid
        raise AssertionError(self.text(node))

    def end(self, node: int, seconds: float = 240) -> int:
        """Wait for the end of a node, which leaves no process."""
        code = self.processes[node].wait(seconds)
        _wait_for(lambda: not self.pids(node), 40)
        return code

    def kill(self) -> None:
        for node in (0, 1):
            for pid in self.pids(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    for name in NAMES:
        _ip("netns", "del", name, check=False)
    try:
        for name in NAMES:
            _ip("netns", "add", name)
        _ip(
            "link",
            "add",
            "eth0",
            "netns",
            NAMES[0],
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            NAMES[1],
        )
        for node, name in enumerate(NAMES):
            _ip("-n", name, "address", "add", f"{NETWORK}{node + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    else:
        yield
    finally:
        for name in NAMES:
            _ip("netns", "del", name, check=False)


@pytest.fixture
def nodes(network: None, tmp_path: Path) -> Iterator[Nodes]:  # noqa: ARG001 - another fixture
    _ip("-n", NAMES[1], "link", "set", "eth0", "up")
    pair = Nodes(tmp_path)
    yield pair
    pair.kill()


def _run(nodes: Nodes, script: str, words: list[str]) -> None:
    for node in (0, 1):
        nodes.start(node, script, words)
    assert [nodes.end(node) for node in (0, 1)] == [0, 0], nodes.text(0) + nodes.text(1)


def test_three_steps_are_those_of_one_node(nodes: Nodes, world: Path, tmp_path: Path) -> None:
    """Two ranks on two nodes write the bytes of two ranks on one; only node 0 writes the log."""
    for folder, is_two in (("two", True), ("one", False)):
        start, model, policy = (tmp_path / folder / name for name in ("sft", "reward", "ppo"))
        for stage, words in (
            ("step1_sft", sft(world, start, 2)),
            ("step2_reward", reward(world, start / "final", model, 2)),
            ("step3_ppo", ppo(world, start / "final", model / "final", policy, 2)),
        ):
            if is_two:
                _run(nodes, f"{stage}.sh", words)
            else:
                succeed(f"{stage}.main", words, tmp_path, ranks=2)
    for step in ("sft", "reward", "ppo"):
        two, one = tmp_path / "two" / step, tmp_path / "one" / step
        assert timeless(two) == timeless(one)
        weights = [*(one / "final").glob("*.safetensors")]
        assert weights and all((two / "final" / w.name).read_bytes() == w.read_bytes() for w in weights)
        assert (two / "train.log").read_text().count("=== ") == 1


def _begin(nodes: Nodes, world: Path) -> tuple[Path, list[str]]:
    """Start a long step 1, and return when both nodes train."""
    output = nodes.folder / "out"
    words = [*sft(world, output, 1000), "--save_steps", "1"]
    for node in (0, 1):
        nodes.start(node, "step1_sft.sh", words)
    _wait_for(lambda: "train/loss" in _read(output / "metrics.jsonl"), 240)
    return output, words


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _ends(nodes: Nodes, line: str, other_line: str) -> None:
    """Both nodes fail within a minute; their last lines name the rank, node or network."""
    began = time.monotonic()
    assert [nodes.end(node, 70) for node in (0, 1)] == [1, 1], nodes.text(0) + nodes.text(1)
    assert time.monotonic() - began < 60
    assert line in nodes.text(0) and other_line in nodes.text(1), nodes.text(0) + nodes.text(1)


def test_killed_rank_ends_all_and_one_node_resumes(nodes: Nodes, world: Path, tmp_path: Path) -> None:
    output, words = _begin(nodes, world)
    os.kill(nodes.rank(1), signal.SIGKILL)
    _ends(nodes, "node 1 (host1), rank 1: no sign of life for 40 s", "Rank 1 was killed (signal 9)")
    done = len(timeless(output))
    words[words.index("--max_steps") + 1] = str(done + 2)
    succeed("step1_sft.main", words, tmp_path, ranks=2)
    assert (output / "final").exists() and len(timeless(output)) > done


def test_cut_network_ends_both_sides(nodes: Nodes, world: Path) -> None:
    _begin(nodes, world)
    _ip("-n", NAMES[1], "link", "set", "eth0", "down")
    silence = "no sign of life for 40 s"
    _ends(nodes, f"node 1 (host1), rank 1: {silence}", f"node 0 ({NETWORK}1:29500): {silence}")


def test_signal_to_one_node_stops_both(nodes: Nodes, world: Path) -> None:
    _begin(nodes, world)
    nodes.processes[1].send_signal(signal.SIGTERM)
    assert [nodes.end(node, 60) for node in (0, 1)] == [75, 75], nodes.text(0) + nodes.text(1)


@pytest.mark.skipif(not shutil.which("pdsh"), reason="needs pdsh: apt-get install pdsh")
def test_hosts_stop_when_asked_and_when_alone_and_one_resumes(
    nodes: Nodes, world: Path, tmp_path: Path
) -> None:
    """HOSTFILE, with a fake ssh: SIGTERM to the first machine, and then SIGKILL."""
    output = tmp_path / "it's $(c) 100%n; & *"
    words = [*sft(world, output, 1000), "--save_steps", "0"]
    (tmp_path / "common").mkdir()
    (tmp_path / "common/__init__.py").write_text("raise SystemExit('the wrong package')")
    done = 0
    for is_asked in (True, False):
        head = nodes.start_hosts(words)
        _wait_for(lambda done=done: _read(output / "metrics.jsonl").count("train/loss") > done, 240)
        if is_asked:
            head.send_signal(signal.SIGTERM)
            assert head.wait(60) == 75 and nodes.text(0).count("Stopped at step") == 1, nodes.text(0)
        else:
            head.kill()
        _wait_for(lambda: not nodes.pids(0) and not nodes.pids(1), 60)
        assert not [*tmp_path.rglob("start.sh")]
        done = int(sorted((output / "checkpoints").iterdir())[-1].name.removeprefix("step_"))
        line = f"Stopped at step {done}; checkpoint {output}/checkpoints/step_"
        assert (output / "train.log").read_text().splitlines()[-1].startswith(line)
    words[words.index("--max_steps") + 1] = str(done + 2)
    succeed("step1_sft.main", words, tmp_path, ranks=2)
    assert (output / "final").exists() and _read(output / "metrics.jsonl").count("train/loss") == done + 2


@pytest.mark.rare
def test_other_number_of_ranks_ends_both(nodes: Nodes, world: Path) -> None:
    words = sft(world, nodes.folder / "out", 2)
    nodes.start(0, "step1_sft.sh", words)
    nodes.start(1, "step1_sft.sh", words, NUM_GPUS="2")
    line = "4 ranks here, 2 on node 0; NNODES and NUM_GPUS must be the same on all nodes"
    assert [nodes.end(node, 120) for node in (0, 1)] == [1, 1]
    assert line in nodes.text(1) and "node 1: rank 1 has not started within 60 s" in nodes.text(0)
    assert not (nodes.folder / "out/final").exists()


@pytest.mark.parametrize(
    ("node", "line"),
    [
        (0, "node 1: rank 1 has not started within 5 s"),
        (1, f"node 0 ({NETWORK}1:29500): no answer within 5 s"),
    ],
)
def test_node_that_never_comes(nodes: Nodes, world: Path, node: int, line: str) -> None:
    nodes.start(node, "step1_sft.sh", sft(world, nodes.folder / "out", 2), NODE_WAIT="5")
    assert nodes.end(node, 120) == 1
    assert line in nodes.text(node)


def test_script_refuses_before_anything_is_written(nodes: Nodes, world: Path) -> None:
    nodes.start(1, "step1_sft.sh", sft(world, nodes.folder / "out", 2), NODE_RANK="2")
    assert nodes.end(1) == 2 and not (nodes.folder / "out").exists()
    assert nodes.text(1) == "error: NODE_RANK 2: must be a number from 0 to 1\n"

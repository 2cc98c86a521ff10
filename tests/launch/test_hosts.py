"""The hosts of HOSTFILE, the script that each of them runs, and the end of all; with a fake pdsh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.lib.hosts import ending, read_hosts, shared_folder, start_script, variables
from tests.conftest import REPOSITORY

WORDS = [
    "--a",
    "a b",
    "$(touch bad) `touch bad` $HOME ;&|<>",
    """it's "quoted" \\ *""",
    "",
    "ä\n%n",
    "--b=1%",
]
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))"


def hostfile(folder: Path, text: str) -> Path:
    (folder / "hosts").write_text(text)
    return folder / "hosts"


def test_hosts_and_ranks(tmp_path: Path) -> None:
    file = hostfile(tmp_path, "# ours\nnode1 slots=8\n\nme@node2.lan   slots=4 # older\n")
    assert read_hosts(file) == {"node1": 8, "me@node2.lan": 4}
    assert read_hosts(file, "2") == {"node1": 2, "me@node2.lan": 2}


@pytest.mark.parametrize(
    ("text", "ranks", "message"),
    [
        ("", "", "hosts: names no host, as in node1 slots=8"),
        ("node1 slots=8\nnode2\n", "", "hosts:2: must be a host and its GPUs, as in node1 slots=8"),
        ("node[1-2] slots=8\n", "", "hosts:1: must be a host"),
        ("-oProxyCommand=x slots=8\n", "", "hosts:1: must be a host"),
        ("node1 slots=0\n", "", "hosts:1: must be a host"),
        ("a slots=1\nb slots=1\na slots=1", "", "hosts:3: a is there twice"),
        ("a slots=1", "0", "NUM_GPUS 0: must be a number from 1"),
        ("a slots=1", "all", "NUM_GPUS all: must be a number from 1"),
    ],
)
def test_wrong_hosts_are_refused(tmp_path: Path, text: str, ranks: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_hosts(hostfile(tmp_path, text), ranks)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="none: no such file"):
        read_hosts(tmp_path / "none")


def test_variables_of_the_first_machine_reach_the_ranks_except_its_own() -> None:
    given = {
        "PATH": "/opt/bin", "HF_TOKEN": "secret", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "3", "MINE": "a\nb", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7",
    }  # fmt: skip
    own = dict.fromkeys(
        ("HOME", "SSH_CLIENT", "SLURM_NNODES", "CUDA_VISIBLE_DEVICES", "HOSTFILE", "_", "BASH_FUNC_x%%"), "x"
    )
    chosen = variables({**given, **own, "NNODES": "1"}, {"one": 2, "two": 1}, "/shared/f")
    nodes = {"NNODES": "2", "TRIPTYCH_SLOTS": "2 1", "TRIPTYCH_HOSTS": "/shared/f"}
    assert chosen == {**given, **nodes}
    address, port = (variables({}, {"me@one": 2}, "/f")[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
    assert address == "one" and 20_000 <= int(port) < 32_000


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_every_character_reaches_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    """Through the shell of the host, from an empty environment, with the number of ranks of the host."""
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / ".deepspeed_env").write_text("\nLINE=set twice\nPATH=$PATH:/opt\nno line\n")
    (folder / "show.sh").write_text(f"exec {sys.executable} -c '{SHOW}' \"$@\"\n")
    values = {"MINE": WORDS[2], "LINE": "once", "TRIPTYCH_SLOTS": "8 4", "TRIPTYCH_HOSTS": str(folder)}
    (folder / "start.sh").write_text(start_script(["show.sh", *WORDS], values))
    done = subprocess.run(
        [shell, "-c", "exec env NODE_RANK=1 bash start.sh"],
        env={"PATH": os.environ["PATH"], "HOME": "/"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words, environment, cwd = json.loads(done.stdout)
    assert words == WORDS and cwd == str(folder) and not (folder / "bad").exists()
    expected = {**values, "LINE": "set twice", "NUM_GPUS": "4", "PATH": f"{os.environ['PATH']}:/opt"}
    assert {name: environment[name] for name in expected} == expected
    assert (folder / "began_1").exists()


def test_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shared_folder(Path("new/out")) == shared_folder(Path("/dev/null")) == tmp_path
    (tmp_path / "out").mkdir()
    assert shared_folder(Path("out")) == tmp_path / "out"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0), ([75, 75], 75), ([75, 255], 75), ([2, 75], 2), ([1, 75], 1), ([137, 2], 1),
        ([0, 255], 0), ([255, 255], 1),
    ],
)  # fmt: skip
def test_exit_code_of_all_hosts(codes: list[int], expected: int) -> None:
    assert ending(codes) == expected


def start(folder: Path, pdsh: str, **more: str) -> subprocess.CompletedProcess:
    """Run hosts.py with a fake pdsh, which finds the shared folder in $F."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "pdsh").write_text(f'#!/bin/bash\nF="$(dirname "${{@: -1}}")"; F="${{F##* }}"\n{pdsh}\n')
    (tools / "pdsh").chmod(0o755)
    file = hostfile(folder, "one slots=1\ntwo slots=1\n")
    path = f"{tools}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, REPOSITORY / "launch/lib/hosts.py", folder / "new/out", "step.sh"],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "HOSTFILE": str(file), **more},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60,
    )  # fmt: skip


def end(host: str, code: int) -> str:
    return f"echo 'pdsh@head: {host}: ssh exited with exit code {code}'"


def test_last_lines_are_shown_once_and_codes_not_at_all(tmp_path: Path) -> None:
    lines = ["one: step 1", "two: step 1", "one: Stopped at step 1.", "two: Stopped at step 1."]
    done = start(tmp_path, "\n".join([*(f"echo '{line}'" for line in lines), end("one", 75), end("two", 75)]))
    assert (done.returncode, done.stdout.splitlines()) == (75, lines[:3])
    assert {path.name for path in tmp_path.iterdir()} == {"tools", "hosts"}


def test_host_that_ssh_does_not_reach_ends_the_others(tmp_path: Path) -> None:
    reason = "two: ssh: connect to host two port 22: No route to host"
    lines = f"touch $F/began_0\necho '{reason}'\n{end('two', 255)}"
    done = start(tmp_path, f"{lines}\nsleep 60")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == f"error: HOSTFILE {tmp_path}/hosts: ssh cannot connect to two"
    assert {path.name for path in tmp_path.iterdir()} == {"tools", "hosts"}


def test_lost_connection_ends_no_other_host(tmp_path: Path) -> None:
    lines = f"touch $F/began_0 $F/began_1\n{end('two', 255)}\nsleep 0.5\necho 'one: Stopped.'"
    done = start(tmp_path, f"{lines}\n{end('one', 75)}")
    assert (done.returncode, done.stdout) == (75, "one: Stopped.\n")


@pytest.mark.parametrize(
    ("begun", "signals", "code", "last"),
    [
        ("", 1, 75, "Stopped during preparation; nothing to save."),
        ("touch $F/began_0\n", 1, 75, "one: asked"),
        ("touch $F/began_0\n", 2, 1, "Killed by a second signal;"),
    ],
)
def test_signals_to_the_first_machine(tmp_path: Path, begun: str, signals: int, code: int, last: str) -> None:
    """The first one asks the hosts for a stop if they have begun, a second one kills them."""
    asked = f"until [ -e $F/stop ]; do sleep 0.1; done\necho one: asked\n{end('one', 75)}\n{end('two', 75)}"
    wait = "sleep 60" if signals == 2 else asked
    sender = "".join(f"kill -TERM $PPID; sleep {2.2 if signals == 2 else 0};" for _ in range(signals))
    done = start(tmp_path, f"{begun}(sleep 0.5; {sender}) &\n{wait}")
    assert done.returncode == code and done.stdout.splitlines()[-1].startswith(last)


def test_pdsh_is_missing(tmp_path: Path) -> None:
    file = hostfile(tmp_path, "one slots=1\n")
    done = subprocess.run(
        [sys.executable, REPOSITORY / "launch/lib/hosts.py", tmp_path / "out", "step.sh"],
        env={"PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY), "HOSTFILE": str(file)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    line = "error: HOSTFILE needs pdsh and ssh, and one of them"
    assert done.returncode == 2 and done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1 and {path.name for path in tmp_path.iterdir()} == {"hosts"}

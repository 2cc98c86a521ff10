"""Start a launch script on all hosts of $HOSTFILE by pdsh and ssh, where it runs as on several nodes.

    python launch/lib/hosts.py OUTPUT_DIR SCRIPT OPTIONS

A folder beside the output, which the hosts share, holds the command, and later a request to stop. The end of
pdsh closes the standard input of each host, which then stops the run. Exit codes: see supervise.py.
"""

import contextlib
import ctypes
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from launch.lib.supervise import KILLED, REFUSED, STOPPED, UNBEGUN, kill, listen

LINE = re.compile(r"(\w[\w.@-]*)\s+slots=([1-9]\d{0,3})")
SSH = "-oBatchMode=yes -oServerAliveInterval=15"
LAST_LINES = 3.0  # seconds for the last lines of killed hosts
NO_CONNECTION = 255  # exit code of ssh
ENDED = re.compile(rb"pdsh@[^:]*: (\S+): ssh exited with exit code (\d+)")
# Every host ends with such a line.
LAST_LINE = re.compile(rb"\S+: ((?:error: |Stopped|Killed|Failed with).*)", re.DOTALL)
# Variables of this machine or session; all others reach the ranks.
LOCAL = re.compile(
    "HOME|USER|LOGNAME|SHELL|SHLVL|PWD|OLDPWD|_|HOST|HOSTNAME|TERM|TMPDIR|MAIL|DISPLAY|HOSTFILE|NODE_RANK"
    "|CUDA_VISIBLE_DEVICES|(SSH_|SLURM|XDG_SESSION|XDG_RUNTIME|DBUS_|PMI|OMPI_|TRIPTYCH_).*"
)


def main() -> int:
    output, words = Path(sys.argv[1]), sys.argv[2:]
    try:
        hosts = read_hosts(Path(os.environ["HOSTFILE"]), os.environ.get("NUM_GPUS", ""))
        if not (shutil.which("pdsh") and shutil.which("ssh")):
            raise ValueError(
                "HOSTFILE needs pdsh and ssh, and one of them is not installed; without them, start the"
                " script on each node with NNODES, NODE_RANK and MASTER_ADDR"
            )
        with tempfile.TemporaryDirectory(
            prefix=".triptych-", dir=shared_folder(output), ignore_cleanup_errors=True
        ) as folder:
            script = start_script(words, variables(os.environ, hosts, folder))
            (Path(folder) / "start.sh").write_text(script)
            return run([*hosts], Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def read_hosts(file: Path, ranks: str = "") -> dict[str, int]:
    """Hosts and their numbers of ranks, in the format of DeepSpeed. ranks: $NUM_GPUS, which replaces them."""
    if not file.is_file():
        raise ValueError(f"HOSTFILE {file}: no such file")
    if ranks and not re.fullmatch(r"[1-9]\d{0,3}", ranks):
        raise ValueError(f"NUM_GPUS {ranks}: must be a number from 1")
    hosts: dict[str, int] = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not (content := line.partition("#")[0].strip()):
            continue
        match = LINE.fullmatch(content)
        if not match:
            raise ValueError(f"HOSTFILE {file}:{number}: must be a host and its GPUs, as in node1 slots=8")
        if match[1] in hosts:
            raise ValueError(f"HOSTFILE {file}:{number}: {match[1]} is there twice")
        hosts[match[1]] = int(ranks or match[2])
    if not hosts:
        raise ValueError(f"HOSTFILE {file}: names no host, as in node1 slots=8")
    return hosts


def shared_folder(output: Path) -> Path:
    """The nearest existing folder of the output."""
    path = (Path() if output == Path("/dev/null") else output).resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def variables(given: Mapping[str, str], hosts: Mapping[str, int], folder: str) -> dict[str, str]:
    """The environment of the run on each host, besides its number."""
    chosen = {name: given[name] for name in given if name.isidentifier() and not LOCAL.fullmatch(name)}
    chosen.setdefault("MASTER_ADDR", address(next(iter(hosts))))
    chosen.setdefault("MASTER_PORT", str(random.randrange(20_000, 32_000)))  # runs on one node do not collide
    slots = " ".join(map(str, hosts.values()))
    return {**chosen, "NNODES": str(len(hosts)), "TRIPTYCH_SLOTS": slots, "TRIPTYCH_HOSTS": folder}


def address(host: str) -> str:
    """The host name that ssh connects to: $HOSTFILE may hold a short name from the configuration of ssh."""
    done = subprocess.run(["ssh", "-G", host], capture_output=True, text=True, check=False)
    names = re.findall("^hostname (.+)$", done.stdout, re.MULTILINE)
    return names[0] if names else host


def start_script(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """What each host runs, with its number in $NODE_RANK. Any shell may be the login shell that starts it."""
    slots = environment["TRIPTYCH_SLOTS"]
    return "\n".join(
        [
            f"cd {shlex.quote(os.getcwd())} || exit 1",  # noqa: PTH109
            *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
            *(f'export {name}="{value}"' for name, value in own_lines()),
            f"slots=({slots})",
            "export NUM_GPUS=${slots[NODE_RANK]}",
            ': >"$TRIPTYCH_HOSTS/began_$NODE_RANK"',
            f"exec bash {shlex.join(words)}\n",
        ]
    )


def own_lines() -> Iterable[tuple[str, str]]:
    """Names and values of the user's environment file for DeepSpeed; the shell of the host expands them."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path.home() / name, Path(name)):
        for line in path.read_text().splitlines() if path.is_file() else ():
            name, equals, value = line.strip().partition("=")
            if equals:
                yield name, value


def connect(hosts: Iterable[str], folder: Path) -> subprocess.Popen:
    """Start pdsh, which runs start.sh on all hosts and ends with this process."""
    remote = f"exec env NODE_RANK=%n bash {shlex.quote(str(folder)).replace('%', '%%')}/start.sh"
    environment = {**os.environ, "PDSH_RCMD_TYPE": "ssh"}
    environment["PDSH_SSH_ARGS_APPEND"] = f"{SSH} {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # Slurm signals all processes: pdsh and ssh inherit this
    return subprocess.Popen(
        ["pdsh", "-f", "1024", "-w", ",".join(hosts), remote], env=environment, preexec_fn=_end_with_parent,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(hosts: Sequence[str], folder: Path) -> int:
    """Show what all hosts print, and return the exit code. A host that ssh does not reach ends the others."""
    child = connect(hosts, folder)
    signals = listen(folder, partial(_kill_hosts, child, folder))
    marks = {host: folder / f"began_{i}" for i, host in enumerate(hosts)}
    codes, shown, unreachable, script = dict.fromkeys(hosts, 0), set(), [], folder / "start.sh"
    for line in child.stdout:
        if script.exists() and all(mark.exists() for mark in marks.values()):
            script.unlink()  # it may hold passwords, and outlives this process if that is killed
        if match := ENDED.search(line):
            host, code = match[1].decode(), int(match[2])
            codes[host] = code
            if code == NO_CONNECTION and not marks[host].exists():
                unreachable.append(host)
                kill(child)
        elif not ((match := LAST_LINE.fullmatch(line)) and match[1] in shown):
            shown |= {match[1]} if match else set()
            show(line)
    is_killed = child.wait() < 0
    if unreachable:
        raise ValueError(f"HOSTFILE {os.environ['HOSTFILE']}: ssh cannot connect to {unreachable[0]}")
    if not is_killed:
        return ending([*codes.values()])
    last = [(1, "pdsh was killed; the hosts stop the run.\n"), (STOPPED, UNBEGUN), (1, KILLED)]
    code, text = last[min(len(signals), 2)]
    show(text.encode())
    return code


def _kill_hosts(child: subprocess.Popen, folder: Path) -> None:
    (folder / "kill").touch()
    timer = threading.Timer(LAST_LINES, kill, [child])
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def show(line: bytes) -> None:
    """Write a line to the terminal, which may be closed."""
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def ending(codes: Sequence[int]) -> int:
    """The exit code of a run from those of its hosts, without lost connections unless all are lost."""
    known = {code for code in codes if code != NO_CONNECTION} or {1}
    if known - {0, REFUSED, STOPPED}:
        return 1
    return next((code for code in (REFUSED, STOPPED) if code in known), 0)


if __name__ == "__main__":
    sys.exit(main())

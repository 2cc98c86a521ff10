"""Put one fault after the other into a copy of the repository, and run the tests that should notice it.

    python -m tests.mutants                       # all; about half an hour on an idle machine
    python -m tests.mutants --only losses export  # some areas, or some faults by name

First the tests run on the unchanged copy, where they must pass. Exit code 1 if a fault survives. Processes
are forked after the imports of the libraries, which saves seconds for each fault.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import tests.conftest  # noqa: F401 - sets the environment
from tests.mutants.faults import Fault, read_faults

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("deepspeed.runtime.zero.muon.original_muon", "peft", "torch.utils.tensorboard", "transformers")
TIMEOUT = 600.0  # seconds; a fault may make a run hang, which is noticed too
FORK = multiprocessing.get_context("fork")
PASSED, FAILED = 0, 1  # exit codes of pytest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], help="areas or names of faults")
    parser.add_argument("--output", default="output/mutants.md", help="Markdown table of the results")
    options = parser.parse_args()
    for library in LIBRARIES:
        importlib.import_module(library)
    faults = read_faults()
    wanted = {*options.only}
    if unknown := wanted - {f.name for f in faults} - {f.area for f in faults}:
        parser.error(f"--only: no such area or fault: {' '.join(sorted(unknown))}")
    chosen = [f for f in faults if not wanted or wanted & {f.name, f.area}]
    with tempfile.TemporaryDirectory() as folder:
        root = copy_repository(Path(folder))
        if problems := [problem for f in chosen if (problem := f.problem(root))]:
            sys.exit("\n".join(problems))
        tests = [*dict.fromkeys(test for f in chosen for test in f.tests)]
        print(f"{len(chosen)} faults; first their {len(tests)} tests without a fault", flush=True)
        code, output = run_tests(tests, root)
        if code != PASSED:
            sys.exit(f"{output}\nthe tests fail without a fault")
        results = [(fault, *survives(fault, root)) for fault in chosen]
    lines = table(results)
    path = ROOT / options.output
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(any(survived for _, survived, _ in results))


def copy_repository(folder: Path) -> Path:
    """A copy of the files that git does not ignore, with the folder `shared` beside it."""
    root = folder / "repository"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())
    return root


def survives(fault: Fault, root: Path) -> tuple[bool, float]:
    """Whether the tests pass in spite of the fault, and how many seconds they took."""
    before, start = (root / fault.file).read_text(), time.monotonic()
    fault.apply(root)
    try:
        code, output = run_tests(["-x", *fault.tests], root)
    finally:
        (root / fault.file).write_text(before)
    if code not in (PASSED, FAILED):
        sys.exit(f"{output}\n{fault.area}.{fault.name}: the tests did not run")
    seconds = time.monotonic() - start
    result = "SURVIVES" if code == PASSED else "noticed"
    print(f"{result:8} {seconds:5.1f} s  {fault.area}.{fault.name}: {fault.about}", flush=True)
    return code == PASSED, seconds


def run_tests(words: Sequence[str], root: Path) -> tuple[int, str]:
    """Exit code and output of pytest in a copy; a run that takes too long has failed."""
    log = root.parent / "log"
    child = FORK.Process(target=_pytest, args=(words, root, log))
    child.start()
    child.join(TIMEOUT if "-x" in words else None)
    if child.is_alive():
        os.killpg(child.pid, 9)
        child.join()
        return FAILED, "timeout"
    return child.exitcode, log.read_text()


def _pytest(words: Sequence[str], root: Path, log: Path) -> None:
    os.setsid()  # so that a run that hangs ends with its ranks
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(root)
    sys.path[:] = [str(root), *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.dont_write_bytecode = True  # a fault may leave size and time of a file as they were
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    options = "-q", "--whole", "-p", "no:cacheprovider", "--basetemp", str(root.parent / "temporary")
    code = pytest.main([*options, *words])
    sys.stdout.flush()
    os._exit(int(code))


def table(results: Sequence[tuple[Fault, bool, float]]) -> list[str]:
    """Markdown: a line for each area, and the faults that survived."""
    lines = ["| area | faults | survivors | seconds |", "|---|---|---|---|"]
    for area in [*dict.fromkeys(fault.area for fault, *_ in results), "all"]:
        part = [row for row in results if area in (row[0].area, "all")]
        survivors, seconds = sum(row[1] for row in part), sum(row[2] for row in part)
        lines.append(f"| {area} | {len(part)} | {survivors} | {seconds:.0f} |")
    survivors = [fault for fault, survived, _ in results if survived]
    return lines + [f"- survives: {fault.area}.{fault.name}: {fault.about}" for fault in survivors]


if __name__ == "__main__":
    main()

"""Checks on one GPU: what the CPU cannot show. Each prints PASS, FAIL or SKIP with its figure.

    python tests/gpu/prove.py                            # all, in at most 8 minutes on one H100 with 80 GB
    python tests/gpu/prove.py --only draws graphs        # some
    python tests/gpu/prove.py --cpu                      # the same code, tiny and on the CPU

A check is a process of its own with a time limit. Those that measure time or memory run alone, after the
others. Exit code 1 if a check fails.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if "--cpu" in sys.argv:  # before DeepSpeed looks for an accelerator
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the launch scripts do

from common.runtime.options import reason
from tests.gpu import four_bits, launched, machine, memory, passes, sampling
from tests.gpu.setting import Outcome, Setting, prepare

LIMIT = 480  # seconds for all checks on a GPU
SLOWER = 4  # limits of checks on the CPU, relative to a GPU
WORKERS = 4  # checks at once
SHOWN_LINES = 12  # of the log of a check that failed
SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
RESULTS = {True: "PASS", False: "FAIL", None: "SKIP"}


class Check(NamedTuple):
    """A check, its limit in seconds, and whether it needs the machine for itself."""

    run: Callable[[Setting], Outcome]
    seconds: int = 90
    is_alone: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


CHECKS = [
    Check(machine.environment),
    Check(launched.quickstart, 180),
    Check(launched.deterministic, 120),
    Check(launched.move, 120),
    Check(launched.offload, 180),
    Check(launched.vocabulary),
    Check(launched.stop),
    Check(launched.hpz),
    Check(launched.flash_attention),
    Check(launched.vllm, 120),
    Check(sampling.draws),
    Check(sampling.reads),
    Check(sampling.graphs),
    Check(passes.attention),
    Check(passes.adapters),
    Check(four_bits.four_bits),
    Check(four_bits.paging),
    Check(passes.head, is_alone=True),
    Check(machine.speeds, is_alone=True),
    Check(memory.fine_tuning, 120, is_alone=True),
    Check(memory.iteration, 120, is_alone=True),
    Check(sampling.rollout, 150, is_alone=True),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results")
    parser.add_argument(
        "--speeds", type=Path, metavar="FILE", help="file for speeds that launch/plan.sh reads"
    )
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU")
    options = parser.parse_args()
    names = [check.name for check in CHECKS]
    if unknown := [name for name in options.only if name not in names]:
        return refuse(f"--only {unknown[0]}: no such check; allowed: {' '.join(names)}")
    if not options.cpu and not torch.cuda.is_available():
        return refuse("torch sees no GPU; --cpu runs the checks on tiny models")
    begin = time.monotonic()
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), options.cpu)
        prepare(setting)
        results = run_all(chosen, setting)
    if options.json:
        options.json.write_text(json.dumps(report(results), indent=2) + "\n")
    if options.speeds:
        speeds = {name: speed for outcome, _ in results.values() for name, speed in outcome.speeds.items()}
        options.speeds.write_text(json.dumps(speeds, indent=2) + "\n")
    passed, failed, skipped = (sum(o.passed is one for o, _ in results.values()) for one in RESULTS)
    print(f"{passed} passed, {failed} failed, {skipped} skipped in {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


def refuse(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


def run_all(checks: Sequence[Check], setting: Setting) -> dict[str, tuple[Outcome, float]]:
    """Run the checks, together where that disturbs no measurement, and print a row as each ends."""
    deadline = time.monotonic() + (LIMIT if not setting.is_cpu else float("inf"))
    results: dict[str, tuple[Outcome, float]] = {}

    def run(check: Check) -> None:
        begin = time.monotonic()
        outcome = run_one(check, setting, deadline)
        results[check.name] = outcome, time.monotonic() - begin
        print_row(check, setting, *results[check.name])

    with ThreadPoolExecutor(1 if setting.is_cpu else WORKERS) as pool:
        list(pool.map(run, (check for check in checks if not check.is_alone)))
    for check in checks:
        if check.is_alone:
            run(check)
    return results


def run_one(check: Check, setting: Setting, deadline: float) -> Outcome:
    """Run a check in a process of its own; an error, a crash or a late end is a failure."""
    limit = min(check.seconds * (SLOWER if setting.is_cpu else 1), deadline - time.monotonic())
    if limit <= 0:
        return Outcome(False, f"not started: {LIMIT} s are over")
    answers, sender = SPAWN.Pipe(duplex=False)
    child = SPAWN.Process(target=work, args=(check.run, setting, log_of(check, setting), sender))
    child.start()
    sender.close()
    try:
        return answers.recv() if answers.poll(limit) else Outcome(False, f"not done after {limit:.0f} s")
    except EOFError:
        child.join()
        return Outcome(False, f"its process ended with exit code {child.exitcode}")
    finally:
        end(child)


def work(run: Callable[[Setting], Outcome], setting: Setting, log: Path, sender: Any) -> None:
    """Run a check and send its outcome; the log gets its output and that of the scripts it starts."""
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    os.environ["XDG_CACHE_HOME"] = str(setting.folder / "cache")  # of tokenised data
    try:
        outcome = run(setting)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other checks go on
        traceback.print_exc()
        outcome = Outcome(False, reason(error))
    sender.send(outcome)


def end(process: Any) -> None:
    """End a check and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.join()


def print_row(check: Check, setting: Setting, outcome: Outcome, seconds: float) -> None:
    print(f"{RESULTS[outcome.passed]}  {check.name:<16}{seconds:6.1f} s  {outcome.figure}", flush=True)
    log = log_of(check, setting)
    if outcome.passed is False and log.exists():
        lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        print("".join(f"      | {line}\n" for line in lines), end="", flush=True)


def log_of(check: Check, setting: Setting) -> Path:
    return setting.folder / f"{check.name}.log"


def report(results: dict[str, tuple[Outcome, float]]) -> dict[str, Any]:
    """Results for a JSON file."""
    return {
        name: {"result": RESULTS[outcome.passed], "figure": outcome.figure, "seconds": round(seconds, 1)}
        for name, (outcome, seconds) in results.items()
    }


if __name__ == "__main__":
    sys.exit(main())

"""Seconds from a command to its stage's first step, and the memory of its processes.

    python tests/bench/start.py bash launch/step1_sft.sh --output_dir OUT ...
    python tests/bench/start.py --make_pairs 1000000 F.jsonl

The first runs a command and prints one line when it has ended. Memory is the most that any process of the
command was seen to hold (resident), and the most that all of them held together (each page counted once);
looked at once a second. The second makes up preference pairs to start with, the same for the same number.
"""

import argparse
import contextlib
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil


def make_pairs(count: int, path: Path) -> None:
    """Write pairs with prompts of 10 to 60 made-up words and responses of 10 to 80, no two alike."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(20_000)]

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(10, most)))

    with path.open("w") as file:
        for number in range(count):
            pair = {"prompt": f"{number}: {text(60)}", "chosen": f" {text(80)}", "rejected": f" {text(80)}"}
            file.write(json.dumps(pair) + "\n")


def first_step_logged(metrics: Path) -> bool:
    return metrics.exists() and '"time/step"' in metrics.read_text()


def memory_gib(process: psutil.Process) -> tuple[float, float]:
    """The largest resident size among a process and its descendants, and the proportional size of all."""
    largest = together = 0.0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it may end while we look
            found = member.memory_full_info()
            largest, together = max(largest, found.rss / 2**30), together + found.pss / 2**30
    return largest, together


def watch(command: list[str]) -> str:
    """Run a command to its end; seconds to its first step and to the end, and its memory, in words."""
    metrics = Path(command[command.index("--output_dir") + 1]) / "metrics.jsonl"
    if metrics.exists():
        sys.exit(f"{metrics} is there already: --output_dir must be a new folder")
    start = looked = time.perf_counter()
    first, largest, together = math.nan, 0.0, 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            if math.isnan(first) and first_step_logged(metrics):
                first = time.perf_counter() - start
            if time.perf_counter() > looked + 1.0:  # a look costs time that the command would use
                looked, found = time.perf_counter(), memory_gib(psutil.Process(running.pid))
                largest, together = max(largest, found[0]), max(together, found[1])
            time.sleep(0.05)
    seconds = time.perf_counter() - start
    return (
        f"exit code {running.returncode}; first step after {first:.1f} s, end after {seconds:.1f} s;"
        f" {largest:.2f} GiB in the largest process, {together:.2f} GiB in all"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make_pairs", type=int, default=0, metavar="N")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="the command, or the file for the pairs")
    args = parser.parse_args()
    if args.make_pairs:
        make_pairs(args.make_pairs, Path(args.words[0]))
    else:
        print(watch(args.words))


if __name__ == "__main__":
    main()

"""Run Triptych, TRL and the bare passes side by side, in turn, and print a table per stage.

    python tests/bench/compare.py [--stages STAGE ...] [--sides SIDE ...] [--json FILE]

Start it with the Python that Triptych runs in. Everyone gets the same random model, data, batch, precision
and number of threads, and a step is timed from the end of the step before to its own end. TRL runs in an
environment of its own under `.venv-bench/`, made on the first run: all but PPO from TRL 1.16.0, PPO from
1.12.0, the last release that has it. Run on an idle machine: two trainings that share cores slow each other
far more than twofold.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".venv-bench"
PYTHON = ENVIRONMENT / "env" / "bin" / "python"
TRL_WITH_PPO = ENVIRONMENT / "trl112"
STAGES = ["sft", "reward", "direct", "ppo"]
# packed: step 1 with --packing. budget: Triptych with --micro_batch_tokens, those of the longest row.
SIDES = ["trl", "triptych", "packed", "budget", "bare"]
Config = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=["trl", "triptych", "bare"], help="In this order."
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--zero_config", default="", help="ZeRO JSON for Triptych. Default: by precision.")
    parser.add_argument("--steps", type=int, default=20, help="Measured steps.")
    parser.add_argument("--warmup", type=int, default=3, help="Steps before them, at least 1.")
    parser.add_argument("--repeats", type=int, default=1, help="Rounds of all sides; their steps are pooled.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--response_length", type=int, default=64, help="New tokens of each PPO response.")
    parser.add_argument("--ppo_epochs", type=int, nargs="+", default=[4, 1], help="One comparison for each.")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument(
        "--lengths", choices=["uniform", "fixed", "conversations"], default="uniform",
        help="Of the records: 52 to 98 tokens, all equal, or spread like those of Open-Assistant.",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="Write all figures to this file.")
    options = parser.parse_args()
    if min(options.steps, options.warmup, options.repeats) < 1:
        parser.error("--steps, --warmup and --repeats are at least 1")
    return options


def last_line(text: str) -> str:
    """What a failed command said last."""
    return (text.strip().splitlines() or ["no output"])[-1]


def make_environment() -> None:
    """Create `.venv-bench/` if it is missing or older than its requirements."""
    stamp, wanted = ENVIRONMENT / "requirements.txt", (HERE / "requirements.txt").read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"making the environment in {ENVIRONMENT.name}/", flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in (
        [sys.executable, "-m", "venv", str(PYTHON.parents[1])],
        [*pip, "-r", str(HERE / "requirements.txt")],
        [*pip, "--no-deps", "--target", str(TRL_WITH_PPO), "trl==1.12.0"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"compare.py: cannot make the environment: {last_line(done.stderr or done.stdout)}")
    stamp.write_text(wanted)


def run_child(script: str, arguments: list[str], config: Config, threads: int) -> Config:
    """Run one of the scripts beside this one, on the CPU, offline; return the JSON of its last line."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if script == "run_trl.py" and arguments == ["ppo"]:
        environment["PYTHONPATH"] = str(TRL_WITH_PPO)
    python = sys.executable if script == "run_triptych.py" else str(PYTHON)
    command = [python, str(HERE / script), *arguments, "--config", json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"compare.py: {' '.join([script, *arguments])} failed: {last_line(done.stderr)}")
    return json.loads(last_line(done.stdout))


def measure(stage: str, epochs: int, options: argparse.Namespace, made: Config, folder: Path) -> Config:
    """All sides of one stage, in turn, as often as asked: step time, tokens per second, memory, passes."""
    total_steps = options.warmup + options.steps
    config = vars(options) | {"json": None, "ppo_epochs": epochs, "total_steps": total_steps}
    config |= {"policy": made["policy"], "reward_model": made["reward_model"], "data": made["data"][stage]}
    tokens = options.batch_size * made["tokens_per_record"][stage]
    tokens += options.batch_size * options.response_length if stage == "ppo" else 0
    found: Config = {side: [] for side in options.sides if side != "packed" or stage == "sft"}
    for number in range(options.repeats):
        for side in found:
            script = {"bare": "bare.py", "trl": "run_trl.py"}.get(side, "run_triptych.py")
            config["packing"] = side == "packed"
            config["micro_batch_tokens"] = options.max_length if side == "budget" else 0
            config["output_dir"] = str(folder / f"{stage}_{epochs}_{side}_{number}")
            print(f"  {stage}: {side}, round {number + 1} of {options.repeats}", file=sys.stderr, flush=True)
            found[side].append(run_child(script, [stage], config, options.threads))
    result: Config = {}
    for side, rounds in found.items():
        seconds = [second for one in rounds for second in one["seconds"]]
        names = rounds[0].get("passes", {})
        # Batches of like length differ much from each other: then only the whole is comparable.
        typical = mean(seconds) if options.lengths == "conversations" else median(seconds)
        result[side] = {
            "step_seconds": typical,
            "tokens_per_second": tokens / typical,
            "peak_gib": max(one["peak_gib"] for one in rounds),
            "passes": {name: median(one["passes"][name] for one in rounds) for name in names},
            "all_seconds": seconds,
        }
    return result


def ratio(result: Config, side: str, base: str) -> str:
    """How many times the step of `base` the step of `side` takes."""
    if side not in result or base not in result:
        return "-"
    return f"{result[side]['step_seconds'] / result[base]['step_seconds']:.2f}"


def print_table(name: str, result: Config) -> None:
    """One stage: a row per side, then what the steps consist of."""
    print(f"\n{name}\n{'':10}{'step s':>9}{'tokens/s':>10}{'peak GiB':>10}{'/ bare':>8}{'/ TRL':>8}")
    for side, row in result.items():
        figures = f"{row['step_seconds']:9.3f}{row['tokens_per_second']:10.0f}{row['peak_gib']:10.2f}"
        print(f"{side:10}{figures}{ratio(result, side, 'bare'):>8}{ratio(result, side, 'trl'):>8}")
    print_phases(result)
    for side, row in result.items():
        if row["passes"]:
            print(f"{side}: " + "  ".join(f"{key} {value:.3f}" for key, value in row["passes"].items()))


def print_phases(result: Config) -> None:
    """Of PPO: what sampling and updates take, over the passes in plain PyTorch."""
    if "rollout" not in result.get("bare", {}).get("passes", {}) or "triptych" not in result:
        return
    bare, ours = result["bare"]["passes"], result["triptych"]["passes"]
    for name in ("rollout", "train"):
        print(f"{name}: {ours[f'time/{name}'] / bare[name]:.2f} of bare")


def main() -> None:
    """Make what is missing, measure, print."""
    options = parse_arguments()
    make_environment()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"compare.py: load {load:.1f}: the machine is not idle, the figures are noise", file=sys.stderr)
    folder = Path(tempfile.mkdtemp(prefix="triptych_bench_"))
    records = options.batch_size * (options.warmup + options.steps)
    wanted = {name: vars(options)[name] for name in ("seed", "lengths", "max_length", "response_length")}
    wanted |= {"folder": str(folder / "made"), "records": records}
    made = run_child("fixture.py", [], wanted, options.threads)
    results: Config = {}
    for stage in options.stages:
        for epochs in options.ppo_epochs if stage == "ppo" else [0]:
            name = f"{stage}, ppo_epochs {epochs}" if stage == "ppo" else stage
            results[name] = measure(stage, epochs, options, made, folder)
            print_table(name, results[name])
    if options.json:
        settings = vars(options) | {"json": str(options.json), "cores": os.cpu_count(), "load": load}
        options.json.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

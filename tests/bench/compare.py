"""Run Triptych, TRL and the bare passes side by side, in turn, and print a table per stage.

    python tests/bench/compare.py [--stages sft reward ppo] [--sides trl triptych bare] [--json FILE]

Everyone gets the same random model, data, batch, precision and number of threads. A step is timed from the end of the
step before to its own end, for Triptych by watching its metrics file grow. TRL runs in an environment of its own under
`.venv-bench/`, made on the first run. SFT and Reward come from TRL 1.16.0, PPO from 1.12.0, the last release that has
it. Run on an idle machine: two trainings that share cores slow each other far more than twofold.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".venv-bench"
PYTHON = ENVIRONMENT / "env" / "bin" / "python"
TRL_WITH_PPO = ENVIRONMENT / "trl112"
Config = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=["sft", "reward", "ppo"], default=["sft", "reward", "ppo"])
    sides = ["trl", "triptych", "bare"]
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides, help="Who runs.")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--zero_config", help="ZeRO JSON for Triptych; default zero0 in fp32, zero1 with bf16 in bf16.")
    parser.add_argument("--steps", type=int, default=20, help="Measured steps.")
    parser.add_argument("--warmup", type=int, default=3, help="Steps before them, at least 1.")
    parser.add_argument("--repeats", type=int, default=1, help="Rounds of all sides in turn; their steps are pooled.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--response_length", type=int, default=64, help="New tokens of each PPO response.")
    parser.add_argument("--ppo_epochs", type=int, nargs="+", default=[4, 1], help="One PPO comparison for each.")
    parser.add_argument("--fixed_lengths", action="store_true", help="All records equally long: no padding.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="Write all figures to this file.")
    options = parser.parse_args()
    if min(options.steps, options.warmup, options.repeats) < 1:
        parser.error("--steps, --warmup and --repeats are at least 1")
    return options


def stop(message: str) -> None:
    """End with one line."""
    sys.exit(f"compare.py: {message}")


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
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            stop(f"cannot make the environment: {' '.join(command[1:])}: {last_line(done.stderr)}")
    stamp.write_text(wanted)


def last_line(text: str) -> str:
    """What a failed command said last."""
    return (text.strip().splitlines() or ["no output"])[-1]


def variables(options: argparse.Namespace, **more: str) -> dict[str, str]:
    """The environment of every child: the same threads, no hub."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    fixed = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | fixed | {"CUDA_VISIBLE_DEVICES": ""} | more


def run_child(script: str, arguments: list[str], config: Config, environment: dict[str, str]) -> Config:
    """Run one of the scripts beside this one and read the JSON of its last line."""
    command = [str(PYTHON), str(HERE / script), *arguments, "--config", json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        stop(f"{script} {' '.join(arguments)} failed: {last_line(done.stderr)}")
    return json.loads(last_line(done.stdout))


def zero_config(options: argparse.Namespace, folder: Path) -> Path:
    """The ZeRO JSON that gives Triptych the wanted precision."""
    if options.zero_config:
        return Path(options.zero_config).resolve()
    shipped = ROOT / "common" / "zero_configs"
    if options.precision == "fp32":
        return shipped / "zero0.json"
    path = folder / "zero1_bf16.json"
    path.write_text(json.dumps(json.loads((shipped / "zero1.json").read_text()) | {"bf16": {"enabled": True}}))
    return path


def triptych_command(stage: str, options: argparse.Namespace, config: Config) -> list[str]:
    """The launch script with its options."""
    values = {
        "output_dir": config["output_dir"],
        "global_batch_size": options.batch_size,
        "micro_batch_size": options.batch_size,
        "max_steps": config["total_steps"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_fraction": 0,
        "save_steps": 0,
        "seed": options.seed,
    }
    zero, rate = zero_config(options, Path(config["output_dir"]).parent), config["learning_rate"]
    if stage == "ppo":
        script = "step3_ppo.sh"
        values |= {"actor_model_name_or_path": config["policy"], "reward_model_name_or_path": config["reward_model"]}
        values |= {"prompt_data": config["data"], "rollout_batch_size": options.batch_size, "temperature": 1.0}
        values |= {"ppo_epochs": config["ppo_epochs"], "max_response_length": options.response_length}
        values |= {"max_prompt_length": options.max_length - options.response_length}
        values |= {"actor_learning_rate": rate, "critic_learning_rate": rate}
        if options.zero_config or options.precision == "bf16":
            values |= {"actor_zero_config": zero, "critic_zero_config": zero}
    else:
        script = {"sft": "step1_sft.sh", "reward": "step2_reward.sh"}[stage]
        values |= {"model_name_or_path": config["policy"], "train_data": config["data"]}
        values |= {"max_length": options.max_length, "learning_rate": rate, "zero_config": zero}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return ["bash", str(ROOT / "launch" / script), *flags]


def run_triptych(stage: str, options: argparse.Namespace, config: Config) -> Config:
    """Run a stage through its launcher; note when each line of its metrics appears."""
    output = Path(config["output_dir"])
    output.parent.mkdir(parents=True, exist_ok=True)
    command = triptych_command(stage, options, config)
    if not Path(command[1]).exists():
        stop(f"Triptych's {stage} cannot run: no {Path(command[1]).relative_to(ROOT)}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = variables(options, PATH=path, MASTER_PORT=port, NUM_GPUS="1")
    log, metrics, seen, ends = output.with_suffix(".log"), output / "metrics.jsonl", 0, []
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        while child.poll() is None:
            size = metrics.stat().st_size if metrics.exists() else 0
            if size > seen:
                seen = size
                ends.append(time.perf_counter())
            time.sleep(0.002)
    if child.returncode:
        errors = [line for line in log.read_text().splitlines() if "Error" in line or "error:" in line]
        stop(f"Triptych's {stage} failed, log in {log}: {last_line(errors[0] if errors else log.read_text())}")
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if "time/step" in row]
    if len(rows) != config["total_steps"] or len(ends) < len(rows):
        stop(f"Triptych's {stage} logged {len(rows)} of {config['total_steps']} steps, log in {log}")
    ends = ends[: len(rows)]
    measured = [row for row in rows if row["step"] > options.warmup]
    parts = {name: median(row[name] for row in measured) for name in measured[0] if name.startswith("time/")}
    seconds = [end - start for start, end in zip(ends[options.warmup - 1 : -1], ends[options.warmup :], strict=True)]
    return {"seconds": seconds, "peak_gib": max(row["memory/peak_gib"] for row in rows), "passes": parts}

"""Train one stage with Triptych's launch script and print one JSON line: step times, their parts, the memory.

Usage: ``run_triptych.py STAGE --config JSON``, in the environment that Triptych runs in. A step
lasts from one line of metrics to the next, as seen from outside, so that fetching the batch and logging
count; the medians of the `time/...` metrics are reported beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "sft": "step1_sft.sh",
    "reward": "step2_reward.sh",
    "direct": "step2_direct.sh",
    "ppo": "step3_ppo.sh",
}
Config = dict[str, Any]


def zero_config(config: Config) -> str:
    """The ZeRO JSON that gives the wanted precision: ZeRO 0 in fp32, ZeRO 1 with bf16 in bf16."""
    if config["zero_config"]:
        return str(Path(config["zero_config"]).resolve())
    shipped = ROOT / "common" / "zero_configs"
    if config["precision"] == "fp32":
        return str(shipped / "zero0.json")
    path = Path(config["output_dir"]).with_suffix(".zero.json")
    values = json.loads((shipped / "zero1.json").read_text()) | {"bf16": {"enabled": True}}
    path.write_text(json.dumps(values))
    return str(path)


def command(stage: str, config: Config) -> list[str]:
    """The launch script with its options."""
    size, rate = config["batch_size"], config["learning_rate"]
    values = {
        "output_dir": config["output_dir"],
        "global_batch_size": size,
        "micro_batch_size": size,
        "max_steps": config["total_steps"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_fraction": 0,
        "save_steps": 0,
        "seed": config["seed"],
    }
    if stage == "ppo":
        values |= {
            "actor_model_name_or_path": config["policy"],
            "reward_model_name_or_path": config["reward_model"],
            "prompt_data": config["data"],
            "rollout_batch_size": size,
            "ppo_epochs": config["ppo_epochs"],
            "max_prompt_length": config["max_length"] - config["response_length"],
            "max_response_length": config["response_length"],
            "temperature": 1.0,
            "actor_learning_rate": rate,
            "critic_learning_rate": rate,
        }
        if config["zero_config"] or config["precision"] == "bf16":
            values |= {"actor_zero_config": zero_config(config), "critic_zero_config": zero_config(config)}
    else:
        values |= {
            "model_name_or_path": config["policy"],
            "train_data": config["data"],
            "max_length": config["max_length"],
            "learning_rate": rate,
            "zero_config": zero_config(config),
        }
        if config["packing"]:
            values |= {"packing": True}
    if config["micro_batch_tokens"]:
        values |= {"micro_batch_tokens": config["micro_batch_tokens"]}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return ["bash", str(ROOT / "launch" / SCRIPTS[stage]), *flags]


def watch(arguments: list[str], log: Path, metrics: Path) -> list[float]:
    """Run the command and return the moments at which its metrics file grew."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "NUM_GPUS": "1"}
    seen, moments = 0, []
    with log.open("w") as file:
        child = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        while child.poll() is None:
            status = metrics.stat() if metrics.exists() else None
            if status and status.st_size > seen:
                seen = status.st_size
                moments.append(status.st_mtime)
            time.sleep(0.05)  # seldom, as it takes a core from training; shorter than a step
    if child.returncode:
        lines = log.read_text().splitlines() or ["no output"]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        sys.exit(f"log in {log}: {(errors or lines[-1:])[0]}")
    return moments


def main() -> None:
    """Train, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=list(SCRIPTS))
    parser.add_argument("--config", type=json.loads, required=True)
    options = parser.parse_args()
    config = options.config
    if not (ROOT / "launch" / SCRIPTS[options.stage]).exists():
        sys.exit(f"there is no launch/{SCRIPTS[options.stage]}")
    output, warmup = Path(config["output_dir"]), config["warmup"]
    log, metrics = output.with_suffix(".log"), output / "metrics.jsonl"
    moments = watch(command(options.stage, config), log, metrics)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if "time/step" in row]
    if len(rows) != config["total_steps"] or len(moments) < len(rows):
        sys.exit(f"log in {log}: {len(moments)} writes and {len(rows)} rows, not {config['total_steps']}")
    moments = moments[: len(rows)]
    names = [name for name in rows[-1] if name.startswith("time/")]
    parts = {name: median(row[name] for row in rows[warmup:]) for name in names}
    seconds = [end - start for start, end in pairwise(moments[warmup - 1 :])]
    peak = max(row["memory/peak_gib"] for row in rows)
    print(json.dumps({"seconds": seconds, "peak_gib": peak, "passes": parts}))


if __name__ == "__main__":
    main()

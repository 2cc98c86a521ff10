"""Runs of the stages in forks of this process, each made once; short ones on the quickstart's models."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SETTINGS = (
    "--max_response_length 40 --rollout_batch_size 64 --global_batch_size 32 --micro_batch_size 32"
    " --ppo_epochs 2 --max_steps 20 --eval_steps 0 --save_steps 0 --logging_steps 1 --max_eval_samples 0"
    " --num_samples 0 --actor_learning_rate 3e-4 --critic_learning_rate 1e-3 --kl_coef 0.05"
)
Lines = list[dict[str, float]]


def parse(description: str, names: Sequence[str]) -> argparse.Namespace:
    """Options of a bench: --quickstart, --seeds and --only."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=names, default=list(names))
    return parser.parse_args()


def once(
    module: str, options: str, output: Path, made: str = "final/config.json", **paths: str | Path
) -> Path:
    """The folder of a run on one rank, which is made unless its file is there. paths: more options."""
    from tests.ranks import run_stage

    if not (output / made).exists():
        words = options.split()
        for name, path in {**paths, "output_dir": output}.items():
            words += [f"--{name}", str(path)]
        result = run_stage(module, words, output.parent / "logs", timeout=3600)
        if result.codes != [0]:
            sys.exit(f"{output.name}: {(result.output.strip().splitlines() or ['?'])[-1]}")
    return output


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(name: str, seed: int, words: str, quickstart: Path, reward_model: bool = True) -> Lines:
    """The metrics of a run, which is made unless it is there. words: options beside SETTINGS."""
    paths = {
        "actor_model_name_or_path": "step1_sft/final", "prompt_data": "world/prompts.jsonl",
        "eval_data": "world/prompts_heldout.jsonl",
    }  # fmt: skip
    paths |= {"reward_model_name_or_path": "step2_reward/final"} if reward_model else {}
    output = once(
        "step3_ppo.main", f"{SETTINGS} --seed {seed} {words}", quickstart / "short_runs" / f"{name}_{seed}",
        gold_function=f"{ROOT}/tests/bench/gold.py:market",
        **{option: quickstart / path for option, path in paths.items()},
    )  # fmt: skip
    return read(output / "metrics.jsonl")


def last(lines: Lines, name: str, count: int = 1) -> float:
    """The mean of a metric over its last lines."""
    return fmean([line[name] for line in lines if line.get(name) is not None][-count:])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean of the seeds, and their standard deviation if there are several."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"

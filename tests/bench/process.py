"""Process rewards against outcome rewards on arithmetic in steps (`tests/chains.py`), on one core.

python tests/bench/process.py --output_dir output/process

A policy is trained on answers with errors. From the same pairs of right and wrong answers, an outcome model
learns which answer is right, and a process model which line is the first wrong one. Then both select among
samples of the policy, and PPO optimises the policy against one or both. Every seed has models of its own; the
policy is the same. Takes about 20 minutes. What is there already is not made again.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.chains import (
    as_preference,
    as_steps,
    build_model,
    compared,
    demonstrations,
    is_right,
    is_right_throughout,
    make_question,
    write_jsonl,
)

REPOSITORY = Path(__file__).resolve().parents[2]
OPERATIONS, ERROR_RATE = 5, 0.15
DEMONSTRATIONS, PAIRS, HELD_OUT, SAMPLES = 20_000, 2_000, 300, 16
Sample = dict[str, Any]
SCORES: dict[str, Callable[[Sample], float]] = {
    "outcome": lambda one: one["scores"]["reward_model_1"],
    "process, product": lambda one: one["scores"]["process"],
    "process, min": lambda one: min(one["steps"]),
    "process, last": lambda one: one["steps"][-1],
    "both": lambda one: one["score"],
}
REWARDS = {"outcome": ("reward",), "process": ("process",), "both": ("reward", "process")}


def run(script: str, output: Path, *words: Any) -> None:
    """Run a launch script on one rank, unless its result is there."""
    if any((output / name).exists() for name in ("final/config.json", "report.json")):
        return
    output.mkdir(parents=True, exist_ok=True)
    command = ["nice", "-n", "10", "bash", str(REPOSITORY / "launch" / script), "--output_dir", str(output)]
    environment = os.environ | {"NUM_GPUS": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (output.parent / f"{output.name}.log").open("w") as file:
        subprocess.run(
            [*command, *map(str, words)], env=environment, stdout=file, stderr=subprocess.STDOUT, check=True
        )


def write_data(folder: Path) -> None:
    draw = random.Random(0)
    shown = demonstrations(draw, DEMONSTRATIONS, OPERATIONS, ERROR_RATE)
    write_jsonl(folder / "demonstrations.jsonl", shown)
    for name, count in (("train", PAIRS), ("eval", HELD_OUT)):
        records = [*compared(draw, count, OPERATIONS, ERROR_RATE)]
        write_jsonl(folder / f"preferences_{name}.jsonl", map(as_preference, records))
        write_jsonl(folder / f"steps_{name}.jsonl", [one for record in records for one in as_steps(record)])
    for name, count in (("train", 2_000), ("eval", HELD_OUT)):
        prompts = ({"prompt": make_question(draw, OPERATIONS)} for _ in range(count))
        write_jsonl(folder / f"prompts_{name}.jsonl", prompts)


def last(output: Path, name: str) -> float:
    """The last value of a metric."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line][-1]


def read(path: Path) -> list[Sample]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def accuracies(samples: list[Sample], text: str = "completion") -> tuple[float, float]:
    """Share of responses whose result is right, and share of those that are right throughout."""
    judged = [(one["prompt"], one[text]) for one in samples]
    return fmean(is_right(*one) for one in judged), fmean(is_right_throughout(*one) for one in judged)


def best_of(samples: list[Sample], count: int, score: Callable[[Sample], float]) -> tuple[float, float]:
    """Accuracies of the best of the first `count` responses to each prompt."""
    groups = [samples[start : start + count] for start in range(0, len(samples), SAMPLES)]
    return accuracies([max(group, key=score) for group in groups])


def of_seed(folder: Path, seed: int) -> dict[str, tuple[float, ...]]:
    """Train the models of a seed, and measure them."""
    data, policy, own = folder / "data", folder / "sft/final", folder / f"seed_{seed}"
    train = [
        "--model_name_or_path", policy, "--seed", seed, "--global_batch_size", 32, "--micro_batch_size", 32,
        "--max_length", 64, "--learning_rate", 1e-3, "--max_eval_samples", 0, "--eval_steps", 0,
        "--save_steps", 0, "--num_train_epochs",
    ]  # fmt: skip
    files = {
        kind: ["--train_data", data / f"{kind}_train.jsonl", "--eval_data", data / f"{kind}_eval.jsonl"]
        for kind in ("preferences", "steps")
    }
    run("step2_reward.sh", own / "reward", *train, 6, *files["preferences"])
    run("step2_process.sh", own / "process", *train, 6, *files["steps"])
    models = {
        "reward": ["--reward_model_name_or_path", own / "reward/final"],
        "process": ["--process_model_name_or_path", own / "process/final"],
    }
    run(
        "best_of_n.sh", own / "samples", "--model_name_or_path", policy, *models["reward"],
        *models["process"], "--prompt_data", data / "prompts_eval.jsonl", "--samples_per_prompt", SAMPLES,
        "--eval_fraction", 0, "--max_response_length", 40, "--seed", seed, "--generation_batch_size", 256,
    )  # fmt: skip
    figures: dict[str, tuple[float, ...]] = {
        "accuracy of pairs, outcome model": (last(own / "reward", "eval/accuracy"),),
        "accuracy of steps, process model": (last(own / "process", "eval/accuracy"),),
        "first wrong step found, process model": (last(own / "process", "eval/first_error"),),
    }
    samples = read(own / "samples/samples.jsonl")
    figures["one sample"] = accuracies(samples)
    for name, score in SCORES.items():
        for count in (4, SAMPLES):
            figures[f"best of {count}, {name}"] = best_of(samples, count, score)
    for name, kinds in REWARDS.items():
        output = own / f"ppo_{name}"
        words = [word for kind in kinds for word in models[kind]]
        run(
            "step3_ppo.sh", output, "--actor_model_name_or_path", policy, *words, "--seed", seed,
            "--prompt_data", data / "prompts_train.jsonl", "--eval_data", data / "prompts_eval.jsonl",
            "--max_steps", 40, "--rollout_batch_size", 128, "--global_batch_size", 64,
            "--micro_batch_size", 64, "--ppo_epochs", 2, "--max_response_length", 40, "--kl_coef", 0.05,
            "--actor_learning_rate", 3e-4, "--critic_learning_rate", 1e-3, "--eval_steps", 0,
            "--save_steps", 0, "--max_eval_samples", 0, "--num_samples", HELD_OUT,
        )  # fmt: skip
        held_out = read(output / "samples.jsonl")[-HELD_OUT:]
        figures[f"PPO, {name}"] = (*accuracies(held_out, "response"), last(output, "eval/kl"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for all runs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    options = parser.parse_args()
    folder = options.output_dir.resolve()
    if not (folder / "model").exists():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_data(folder / "data")
        build_model(folder / "model", hidden_size=96, layers=3, heads=4)
    run(
        "step1_sft.sh", folder / "sft", "--model_name_or_path", folder / "model", "--max_steps", 1200,
        "--train_data", folder / "data/demonstrations.jsonl", "--max_length", 64, "--learning_rate", 3e-3,
        "--global_batch_size", 64, "--micro_batch_size", 64, "--eval_steps", 400, "--save_steps", 0,
        "--logging_steps", 100,
    )  # fmt: skip
    by_seed = [of_seed(folder, seed) for seed in range(options.seeds)]
    print("| | result right | right throughout | KL |\n|---|---|---|---|")
    for name in by_seed[0]:
        columns = []
        for values in zip(*(figures[name] for figures in by_seed), strict=True):
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            columns.append(f"{fmean(values):.3f}{spread}")
        print("| " + " | ".join([name, *columns, *[""] * (3 - len(columns))]) + " |")


if __name__ == "__main__":
    main()

"""Three rounds of online RLHF against one round with as many labels, in the quickstart's world.

    bash launch/quickstart.sh
    python tests/bench/online.py [--method dpo] [--labels 576] [--seeds 0 1 2]

Labels come from the gold rule. Both arms start from the quickstart's SFT model, sample from the same prompts,
and train the last policy on as many pairs, for as many steps. A run that is there already is only read.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[2]
ARMS = (1, 3)  # rounds
RESPONSES = "--max_response_length 64 --generation_batch_size 256"
REWARD = (
    "--max_length 96 --global_batch_size 32 --micro_batch_size 32 --learning_rate 1e-3 --num_train_epochs 4"
)
DIRECT = (
    "--max_length 96 --global_batch_size 32 --micro_batch_size 32 --learning_rate 3e-4 --num_train_epochs 4"
)
PPO = (
    "--max_steps 40 --rollout_batch_size 128 --global_batch_size 64 --micro_batch_size 64 --ppo_epochs 2"
    " --actor_learning_rate 3e-4 --critic_learning_rate 1e-3 --kl_coef 0.05 --save_steps 0"
)


def run(rounds: int, seed: int, options: argparse.Namespace) -> list[dict[str, float | None]]:
    """The rounds of one run, which is made unless it is there."""
    output = options.quickstart / f"online_{options.method}_{options.labels}" / f"rounds_{rounds}_seed_{seed}"
    world, seeded = options.quickstart / "world", f"--seed {seed}"
    variables = {
        "MODEL": str(options.quickstart / "step1_sft/final"), "OUTPUT": str(output), "ROUNDS": str(rounds),
        "PROMPTS": f"{world}/prompts.jsonl:{options.repeats}", "METHOD": options.method, "LABELS": "gold",
        "GOLD": f"{ROOT}/tests/bench/gold.py:market", "NUM_GPUS": "1", "DS_ACCELERATOR": "cpu",
        "SAMPLE_OPTIONS": f"--prompts_per_round {options.labels // rounds} --eval_fraction 0",
        "STEP2_OPTIONS": f"{REWARD} {seeded}", "DIRECT_OPTIONS": f"{DIRECT} {seeded}", "STEP3_OPTIONS": PPO,
        "EVALUATE_OPTIONS": f"--eval_data {world}/prompts_heldout.jsonl:4 --max_eval_samples 0",
    }  # fmt: skip
    if not (output / "report/scores.png").exists():
        command = ["bash", str(ROOT / "launch/online.sh"), *RESPONSES.split(), *seeded.split()]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"online.py: {rounds} rounds, seed {seed}: {(done.stderr or done.stdout)[-2000:]}")
    return [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation of the seeds; empty if not measured."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{fmean(known):.3f}" + (f" ± {stdev(known):.3f}" if len(known) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--method", choices=("dpo", "ppo"), default="dpo")
    parser.add_argument("--labels", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3, help="how often each prompt may be sampled from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    names = ("pairs", "former_accuracy", "accuracy", "gold", "score", "kl")
    print(f"| rounds | round | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for rounds in ARMS:
        runs = [run(rounds, seed, options) for seed in options.seeds]
        for number in range(rounds + 1):
            cells = [spread([one[number][name] for one in runs]) for name in names]
            print(f"| {rounds} | {number} | {' | '.join(cells)} |", flush=True)
        last = [f"{one[-1]['gold']:.3f}" for one in runs]
        print(f"\ngold at the end by seed: {', '.join(last)}\n")


if __name__ == "__main__":
    main()

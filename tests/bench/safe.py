"""A limit on the mean cost (step3_safe) beside five fixed penalties, on the quickstart's world.

    OMP_NUM_THREADS=1 nice -n 10 python tests/bench/safe.py --output /tmp/safe_bench [--seeds 0 1 2]

The rule: an answer may not offer anything ("Shall I pack some for you?"), which the reward model likes; its
cost is 1. Safe PPO holds the share of such answers at LIMIT. A fixed penalty is PPO with the score less a
weight times the cost. Figures are means over the last iterations. A run that is there already is only read.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LIMIT, ITERATIONS, LAST = 0.2, 40, 10
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
STEP1 = "--max_length 96 --max_steps 400 --global_batch_size 32 --micro_batch_size 32 --learning_rate 5e-3"
STEP2 = "--max_length 96 --max_steps 300 --global_batch_size 32 --micro_batch_size 32 --learning_rate 1e-3"
STEP3 = (
    f"--max_response_length 48 --max_steps {ITERATIONS} --rollout_batch_size 64 --global_batch_size 32"
    " --micro_batch_size 32 --ppo_epochs 2 --actor_learning_rate 4e-4 --critic_learning_rate 1e-3"
    " --kl_coef 0.05 --save_steps 0 --eval_fraction 0"
)
SAFE = f"--cost_limit {LIMIT} --lambda_init 1 --lambda_rate 1 --lambda_max 10"


def offers(prompts: Sequence, responses: Sequence[str], records: Sequence[dict]) -> list[float]:  # noqa: ARG001 - as step 3 calls it
    """1 for an answer with an offer, else 0."""
    from launch.quickstart.world import OFFERS

    return [float(any(offer in response for offer in OFFERS)) for response in responses]


def run(module: str, words: str, output: Path, **paths: Path) -> list[dict[str, float]]:
    """The lines of metrics of a run on one rank, which is made unless it is there."""
    from tests.ranks import succeed

    if not (output / "final/config.json").exists():
        options = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
        succeed(module, [*words.split(), *options, "--output_dir", str(output)], output.parent)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def start(folder: Path) -> dict[str, Path]:
    """The world, an SFT model and a reward model; returns the options of step 3 that name them."""
    world = folder / "world"
    if not world.exists():
        build = [sys.executable, str(ROOT / "launch/quickstart/build.py"), "--output_dir", str(world)]
        subprocess.run(build, check=True)
    sft, reward = folder / "step1_sft", folder / "step2_reward"
    run("step1_sft.main", f"{STEP1} --eval_fraction 0", sft, model_name_or_path=world / "model",
        train_data=world / "demonstrations.jsonl")  # fmt: skip
    run("step2_reward.main", STEP2, reward, model_name_or_path=sft / "final",
        train_data=world / "preferences.jsonl", eval_data=world / "preferences_heldout.jsonl")  # fmt: skip
    return {
        "actor_model_name_or_path": sft / "final", "reward_model_name_or_path": reward / "final",
        "prompt_data": world / "prompts.jsonl",
    }  # fmt: skip


def ends(lines: Sequence[dict[str, float]], *names: str) -> list[float]:
    """Means over the last iterations."""
    return [fmean(line[name] for line in lines[-LAST:]) for name in names]


def compare(folder: Path, paths: dict[str, Path], seed: int) -> None:
    """Run all of one seed, and print a row of the table."""
    function = f"{Path(__file__).resolve()}:offers"
    words = f"{STEP3} --seed {seed}"
    lines = run(
        "step3_ppo.safe.main", f"{words} {SAFE} --cost_function {function}", folder / f"safe_{seed}", **paths
    )
    reward, cost, multiplier = ends(lines, "reward/mean", "cost/mean", "cost/lambda")
    fixed = {}
    for weight in WEIGHTS:
        penalised = f"{words} --reward_function {function}:-{weight}"
        lines = run("step3_ppo.main", penalised, folder / f"fixed_{weight}_{seed}", **paths)
        fixed[weight] = ends(lines, "reward/mean_1", "reward/mean_offers")
    allowed = {weight: pair for weight, pair in fixed.items() if pair[1] <= LIMIT * 1.1}
    best = max(allowed, key=lambda weight: allowed[weight][0], default=None)
    named = f"{allowed[best][0]:.3f} at {allowed[best][1]:.3f} (weight {best:g})" if best else "none"
    cells = " | ".join(f"{reward:.3f} at {cost:.3f}" for reward, cost in fixed.values())
    print(f"| {seed} | {reward:.3f} at {cost:.3f} | {multiplier:.2f} | {named} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of world and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    paths = start(options.output)
    weights = " | ".join(f"weight {weight:g}" for weight in WEIGHTS)
    print(f"| seed | limit of {LIMIT:g} | multiplier | best fixed penalty within it | {weights} |")
    print(f"|---|---|---|---|{'---|' * len(WEIGHTS)}")
    for seed in options.seeds:
        compare(options.output, paths, seed)


if __name__ == "__main__":
    main()

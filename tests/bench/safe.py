"""A limit on the mean cost (step3_safe) beside five fixed penalties, on the quickstart's world.

    OMP_NUM_THREADS=1 nice -n 10 python tests/bench/safe.py --output /tmp/safe_bench [--seeds 0 1 2]

The reward is the quickstart's gold rule, times 5: an offer at the end of an answer ("Shall I pack some for
you?") earns 1. The rule forbids offers: an answer with one costs 1. Safe PPO holds the share of such answers
at LIMIT; a fixed penalty is PPO with the reward less a weight times the cost. The sixth weight is the mean of
the multiplier, which nobody knows before. Figures are means over the last iterations. The model is smaller
than the quickstart's. A run that is there already is only read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quickstart_runs import once, read

LIMIT, ITERATIONS, LAST = 0.3, 100, 50
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
STEP1 = (
    "--max_length 96 --max_steps 400 --global_batch_size 32 --micro_batch_size 32 --learning_rate 1e-2"
    " --logging_steps 50 --eval_fraction 0"
)
STEP3 = (
    f"--max_response_length 48 --max_steps {ITERATIONS} --rollout_batch_size 64 --global_batch_size 32"
    " --micro_batch_size 32 --ppo_epochs 1 --actor_learning_rate 1.5e-3 --critic_learning_rate 3e-3"
    " --kl_coef 0.5 --save_steps 0 --eval_fraction 0"
)
SAFE = f"--cost_limit {LIMIT} --lambda_rate 0.1"


def gold(prompts: Sequence, responses: Sequence[str], records: Sequence[dict]) -> list[float]:  # noqa: ARG001 - as step 3 calls it
    """The quickstart's gold score, times 5."""
    from launch.quickstart.world import gold_score

    pairs = zip(prompts, responses, strict=True)
    return [5 * gold_score(prompt[-1]["content"], response) for prompt, response in pairs]


def offers(prompts: Sequence, responses: Sequence[str], records: Sequence[dict]) -> list[float]:  # noqa: ARG001 - as step 3 calls it
    """1 for an answer with an offer, else 0."""
    from launch.quickstart.world import OFFERS

    return [float(any(offer in response for offer in OFFERS)) for response in responses]


def run(module: str, words: str, output: Path, **paths: Path) -> list[dict[str, float]]:
    """The lines of metrics of a run on one rank, which is made unless it is there."""
    return read(once(module, words, output, **paths) / "metrics.jsonl")


def start(folder: Path) -> dict[str, Path]:
    """The world and an SFT model; returns the options of step 3 that name them."""
    from tests.stages import make_world

    world, sft = folder / "world", folder / "step1_sft"
    if not world.exists():
        make_world(world, hidden_size=64)
    run(
        "step1_sft.main", STEP1, sft, model_name_or_path=world / "model",
        train_data=world / "demonstrations.jsonl",
    )  # fmt: skip
    return {"actor_model_name_or_path": sft / "final", "prompt_data": world / "prompts.jsonl"}


def ends(lines: Sequence[dict[str, float]], *names: str) -> list[float]:
    """Means over the last iterations."""
    return [fmean(line[name] for line in lines[-LAST:]) for name in names]


def compare(folder: Path, paths: dict[str, Path], seed: int) -> None:
    """Run all of one seed, and print a row of the table."""
    here, fixed = Path(__file__).resolve(), {}
    words = f"{STEP3} --seed {seed} --reward_function {here}:gold"
    safe = f"{words} {SAFE} --cost_function {here}:offers"
    lines = run("step3_ppo.safe.main", safe, folder / f"safe_{seed}", **paths)
    reward, cost, multiplier = ends(lines, "reward/mean", "cost/mean", "cost/lambda")
    for weight in (*WEIGHTS, round(multiplier, 1)):
        penalised = f"{words} {here}:offers:-{weight}"
        lines = run("step3_ppo.main", penalised, folder / f"fixed_{weight}_{seed}", **paths)
        fixed[weight] = ends(lines, "reward/mean_gold", "reward/mean_offers")
    allowed = {weight: fixed[weight] for weight in WEIGHTS if fixed[weight][1] <= LIMIT * 1.1}
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
    print(f"| seed | limit of {LIMIT:g} | mean multiplier | best within it | {weights} | its mean |")
    print(f"|---|---|---|---|{'---|' * len(WEIGHTS)}---|")
    for seed in options.seeds:
        compare(options.output, paths, seed)


if __name__ == "__main__":
    main()

"""Process reward models beside outcome models, on arithmetic in steps.

    OMP_NUM_THREADS=1 python tests/bench/process.py --output DIR [--seeds 0 1 2]

A small Llama learns `7-3+2:` -> `7-3=4`, `4+2=6` from demonstrations of which every sixth line is wrong,
and so answers wrongly itself. Both reward models start from it and train on the same responses: the outcome
model on pairs by the last result, the process model on a label per line. Runs that are there already
are only read.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quickstart_runs import last, once, read, spread

OPERATIONS, ERRORS = 4, 1 / 6
NUMBERS = (2, 4, 16)  # n of best of n
TRAINING = "--max_length 64 --global_batch_size 64 --micro_batch_size 64 --save_steps 0 --logging_steps 50"
STEP1 = f"{TRAINING} --max_steps 500 --learning_rate 4e-3 --eval_fraction 0 --seed 0"
REWARD = f"{TRAINING} --max_steps 500 --learning_rate 2e-3 --eval_steps 500"
SAMPLES = (
    f"--samples_per_prompt {NUMBERS[-1]} --max_response_length 48 --keep_truncated"
    " --generation_batch_size 512"
)
STEP3 = (
    "--max_response_length 48 --max_steps 40 --rollout_batch_size 64 --global_batch_size 32"
    " --micro_batch_size 32 --ppo_epochs 2 --actor_learning_rate 3e-4 --critic_learning_rate 1e-3"
    " --kl_coef 0.05 --save_steps 0 --eval_steps 0 --max_eval_samples 0 --num_samples 0"
)


def result(prompts: list[Any], responses: list[str], records: list[dict]) -> list[float]:  # noqa: ARG001
    """1 for a right last result."""
    from tests.chains import is_right

    return [float(is_right(*pair)) for pair in zip(prompts, responses, strict=True)]


def every_line(prompts: list[Any], responses: list[str], records: list[dict]) -> list[float]:  # noqa: ARG001
    """1 for an answer without a wrong line."""
    from tests.chains import answer_lines

    pairs = zip(prompts, responses, strict=True)
    return [float(response.split("\n") == answer_lines(prompt)) for prompt, response in pairs]


def build_world(folder: Path) -> None:
    from tests import chains

    if (folder / "prompts_heldout.jsonl").exists():
        return
    chains.LARGEST, chains.OPERANDS = 9, range(1, 4)  # which a model of this size learns in minutes
    draw = random.Random(0)
    chains.build_model(folder / "model", hidden_size=64, layers=3, heads=4)
    questions = [chains.make_question(draw, OPERATIONS) for _ in range(8_000)]
    answers = ["\n".join(chains.answer_lines(question, draw, ERRORS)) for question in questions]
    pairs = zip(questions, answers, strict=True)
    chains.write_jsonl(folder / "demonstrations.jsonl", [{"prompt": q, "completion": a} for q, a in pairs])
    records = [*chains.compared(draw, 4_000, OPERATIONS, ERRORS)]
    chains.write_jsonl(folder / "preferences.jsonl", map(chains.as_preference, records))
    chains.write_jsonl(folder / "steps.jsonl", [one for record in records for one in chains.as_steps(record)])
    for name, count in (("prompts", 1_000), ("prompts_heldout", 300)):
        chains.write_jsonl(
            folder / f"{name}.jsonl",
            [{"prompt": chains.make_question(draw, OPERATIONS)} for _ in range(count)],
        )


def reward_models(folder: Path, seed: int) -> dict[str, dict[str, Path]]:
    """Trains both. Returns the options that name one of them, or both."""
    sft = once(
        "step1_sft.main", STEP1, folder / "step1_sft",
        model_name_or_path=folder / "model", train_data=folder / "demonstrations.jsonl",
    )  # fmt: skip
    arms = {
        "outcome": ("step2_reward.main", "preferences"),
        "process": ("step2_reward.process.main", "steps"),
    }
    paths = {
        arm: once(
            module, f"{REWARD} --seed {seed}", folder / f"{arm}_{seed}",
            model_name_or_path=sft / "final", train_data=folder / f"{data}.jsonl",
        ) / "final"
        for arm, (module, data) in arms.items()
    }  # fmt: skip
    outcome, process = (
        {"reward_model_name_or_path": paths["outcome"]}, {"process_model_name_or_path": paths["process"]}
    )  # fmt: skip
    return {"outcome": outcome, "process": process, "both": outcome | process}


def best_of_n(folder: Path, arms: dict[str, dict[str, Path]], seed: int) -> dict[tuple[str, int], float]:
    """Share of right results among the best of n, by the score that chooses; `any`: of all responses."""
    samples = {
        arm: read(
            once(
                "step3_ppo.best_of_n.main", f"{SAMPLES} --seed {seed}", folder / f"best_{arm}_{seed}",
                "samples.jsonl", model_name_or_path=folder / "step1_sft/final",
                prompt_data=folder / "prompts_heldout.jsonl", **paths,
            ) / "samples.jsonl"
        )
        for arm, paths in arms.items()
    }  # fmt: skip
    choices: dict[str, tuple[str, Callable[[dict], float]]] = {
        "any": ("outcome", len),
        "outcome": ("outcome", lambda sample: sample["score"]),
        "process: product": ("process", lambda sample: sample["score"]),
        "process: min": ("process", lambda sample: min(sample["steps"])),
        "process: last": ("process", lambda sample: sample["steps"][-1]),
        "both: sum": ("both", lambda sample: sample["score"]),
    }
    shares = {}
    for name, (arm, key) in choices.items():
        for n in NUMBERS:
            groups = [samples[arm][i : i + n] for i in range(0, len(samples[arm]), NUMBERS[-1])]
            chosen = [max(group, key=key) for group in groups] if name != "any" else sum(groups, [])
            rights = result([one["prompt"] for one in chosen], [one["completion"] for one in chosen], [])
            shares[name, n] = fmean(rights)
    return shares


def optimise(folder: Path, paths: dict[str, Path], arm: str, seed: int) -> list[float]:
    """Shares of right results and of answers without a wrong line after PPO, on held-out prompts."""
    here = Path(__file__).resolve()
    output = once(
        "step3_ppo.main",
        f"{STEP3} --seed {seed} --reward_function {here}:result:0 --gold_function {here}:every_line",
        folder / f"ppo_{arm}_{seed}",
        actor_model_name_or_path=folder / "step1_sft/final", prompt_data=folder / "prompts.jsonl",
        eval_data=folder / "prompts_heldout.jsonl", **paths,
    )  # fmt: skip
    lines = read(output / "metrics.jsonl")
    return [last(lines, f"eval/{name}") for name in ("score_result", "gold", "kl")]


def table(title: str, head: Sequence[str], rows: dict[str, list[str]]) -> None:
    print(f"\n| {title} | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    build_world(options.output)
    arms = {seed: reward_models(options.output, seed) for seed in options.seeds}
    lines = [read(options.output / f"process_{seed}/metrics.jsonl") for seed in options.seeds]
    names = ("eval/accuracy", "eval/right_share", "eval/first_error")
    cells = [spread([last(one, name) for one in lines], 3) for name in names]
    table("process model, held out", names, {"": cells})
    lines = [read(options.output / f"outcome_{seed}/metrics.jsonl") for seed in options.seeds]
    table(
        "outcome model, held out",
        ["eval/accuracy"],
        {"": [spread([last(x, "eval/accuracy") for x in lines], 3)]},
    )

    shares = [best_of_n(options.output, arms[seed], seed) for seed in options.seeds]
    rows = {name: [spread([one[name, n] for one in shares], 3) for n in NUMBERS] for name, _ in shares[0]}
    table("right results: chosen by", [f"n = {n}" for n in NUMBERS], rows)
    rows = {}
    for arm in arms[options.seeds[0]]:
        runs = [optimise(options.output, arms[seed][arm], arm, seed) for seed in options.seeds]
        rows[arm] = [spread([*column], 3) for column in zip(*runs, strict=True)]
    table("PPO by", ["right results", "no wrong line", "KL"], rows)


if __name__ == "__main__":
    main()

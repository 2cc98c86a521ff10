"""Options of step 3 against their off state, in the quickstart's world.

    bash launch/quickstart.sh
    python tests/bench/algorithms.py [--seeds 0 1 2] [--only redraws ...]

Each task is a short run in which the option should matter, with a figure that shows whether it does what it
is for. The first row of a task is its off state. Runs that are there already are only read.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gold import market
from quickstart_runs import Lines, last, parse, run, spread

FAST = "--ppo_epochs 8 --actor_learning_rate 1e-3 --max_update_kl 1000"  # so that clips are reached
GROUPS = "--advantage_estimator group --samples_per_prompt 4"
BAND = "--entropy_low 0.2 --entropy_high 0.3 --entropy_coef_step 0.01"
RIGHT = f"--reward_function {__file__}:right --missing_eos_penalty 0"
OPENS = f"--reward_function {__file__}:opens --missing_eos_penalty 0 --max_steps 40"


def right(prompts: list[Any], responses: list[str], records: list[dict]) -> list[float]:
    """1 for an answer that is nearly perfect, else 0: a reward with few values."""
    return [float(score > 0.75) for score in market(prompts, responses, records)]


def opens(prompts: list[Any], responses: list[str], records: list[dict]) -> list[float]:  # noqa: ARG001
    """1 for an answer that starts with a kind word: the reward of the first tokens comes after the last."""
    from launch.quickstart.world import OPENERS

    return [float(response.strip().startswith(OPENERS)) for response in responses]


class Task(NamedTuple):
    """base: options of all its runs. arms: options beside them; the first is the off state."""

    base: str
    arms: tuple[str, ...]
    figure: str
    read: Callable[[Lines], float]
    reward_model: bool = True


def end(metric: str) -> Callable[[Lines], float]:
    return lambda lines: last(lines, metric, 5)


def held_out(metric: str) -> Callable[[Lines], float]:
    return lambda lines: last(lines, f"eval/{metric}")


def largest(metric: str) -> Callable[[Lines], float]:
    return lambda lines: max(line[metric] for line in lines if line.get(metric) is not None)


def off_band(lines: Lines) -> float:
    """Mean distance of the entropy from 0.2 to 0.3, over the last 40 iterations."""
    entropies = [line["policy/entropy"] for line in lines if "policy/entropy" in line][-40:]
    return fmean(max(0.2 - entropy, entropy - 0.3, 0) for entropy in entropies)


def at_first_update(lines: Lines) -> float:
    """The critic's explained variance in the first iteration that changes the actor."""
    return next(line["value/explained_var"] for line in lines if line.get("policy/update_kl"))


TASKS = {
    "clip_higher": Task(
        f"{GROUPS} {FAST} --kl_coef 0", ("", "--clip_range_high 0.28"),
        "entropy at the end", end("policy/entropy"),
    ),
    "dual_clip": Task(
        FAST, ("--dual_clip 0", "--dual_clip 3"), "largest gradient norm", largest("policy/grad_norm"),
    ),
    "two_lambdas": Task(
        f"{OPENS} --gae_lambda 0.8", ("", "--critic_gae_lambda 1", "--length_adaptive_lambda 1"),
        "mean of the rollouts' rewards", lambda lines: last(lines, "reward/mean", 40), reward_model=False,
    ),
    "aggregation": Task(
        GROUPS, ("--loss_aggregation token", "--loss_aggregation sequence", "--loss_aggregation constant"),
        "tokens per response", held_out("length"),
    ),
    "gspo": Task(
        f"{GROUPS} {FAST} --loss_aggregation sequence",
        ("", "--policy_loss gspo --clip_range 3e-2 --clip_range_high 4e-2"),
        "KL to the rollout's policy", end("policy/update_kl"),
    ),
    "cispo": Task(
        f"{GROUPS} --ppo_epochs 4", ("", "--policy_loss cispo --clip_range 1 --clip_range_high 4"),
        "share of tokens that lose their gradient", end("policy/clip_fraction"),
    ),
    "entropy_band": Task(
        f"{GROUPS} --kl_coef 0 --max_steps 80 --lr_scheduler_type constant",
        ("", "--entropy_coef 0.03", f"--entropy_coef 0.03 {BAND}"),
        "distance of the entropy from 0.2 to 0.3", off_band,
    ),
    "kl_estimators": Task(
        f"{GROUPS} --kl_coef 0.3",
        ("--kl_coef 0", "--kl_penalty reward", "--kl_penalty k2", "--kl_penalty k3"),
        "KL to the SFT model", held_out("kl"),
    ),
    "redraws": Task(
        f"{GROUPS} {RIGHT}", ("", "--max_redraws 5"),
        "groups with equal scores in the updates", lambda lines: last(lines, "rollout/equal_groups_left", 20),
        reward_model=False,
    ),
    "overlong": Task(
        f"{GROUPS} --max_response_length 24 --missing_eos_penalty 0",
        ("", "--overlong_buffer 6 --overlong_penalty 2"),
        "share of responses that end", held_out("eos_rate"),
    ),
    "mask_truncated": Task(
        f"{GROUPS} --max_response_length 24 --missing_eos_penalty 0", ("", "--mask_truncated"),
        "share of responses that end", held_out("eos_rate"),
    ),
    "critic_warmup": Task(
        f"{RIGHT} --max_steps 30", ("", "--critic_warmup_steps 10 --critic_warmup_until 0.1"),
        "explained variance at the actor's first update", at_first_update, reward_model=False,
    ),
}  # fmt: skip


def main() -> None:
    options = parse(__doc__, list(TASKS))
    print(f"| task | options | figure | its value | held-out score | KL |\n|{'---|' * 6}")
    for name in options.only:
        task = TASKS[name]
        for number, arm in enumerate(task.arms):
            words = f"{task.base} {arm}"
            runs = [
                run(f"algorithms/{name}_{number}", seed, words, options.quickstart, task.reward_model)
                for seed in options.seeds
            ]
            columns = (task.read, held_out("score"), held_out("kl"))
            cells = [spread([column(lines) for lines in runs], 3) for column in columns]
            print(f"| {name} | {arm or 'off'} | {task.figure} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

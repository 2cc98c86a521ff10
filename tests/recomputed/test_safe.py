"""Step 3 with a limit on costs, against plain PyTorch."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import succeed
from tests.recomputed.passes import recorded
from tests.recomputed.plain import merged
from tests.recomputed.plain_ppo import Iteration, Scorer
from tests.recomputed.plain_safe import SafePPO
from tests.recomputed.test_ppo import OPTIONS, PROMPTS, command, compare, plain_options, scorer_of
from tests.recomputed.tiny import compare_adapted, compare_weights

FUNCTION = """
def late(prompts, responses, records):
    return [sum(letter in "fghij" for letter in response) / 2 - 0.5 for response in responses]
"""
SAFE = {
    **OPTIONS, "cost_limit": 0.1, "lambda_init": 0.8, "lambda_rate": 2.0, "lambda_min": 0.01,
    "lambda_max": 5.0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "function": {"whiten_advantages": "false"},  # a reward model, and a function of costs
    "model": {"reward_model": False, "function_weight": 1.0, "cost_limit": -0.4, "kl_penalty": "k2"},
    "bounds": {"lambda_max": 0.801, "lambda_rate": 9.0, "cost_limit": -2.0, "critic_warmup_steps": 1},
    "lora": {"lora_rank": 2, "reward_model": False, "function_weight": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.rare)])
@pytest.mark.parametrize("case", CASES)
def test_safe(tiny: Path, tmp_path: Path, case: str, ranks: int) -> None:
    """Two critics, combined advantages, the multiplier and its metrics."""
    options = {**SAFE, **CASES[case], "micro_batch_size": 2 // ranks}
    with recorded(tmp_path):
        words = [*command(tiny, tmp_path, options, PROMPTS), *costs(tiny, tmp_path, options)]
        succeed("step3_ppo.safe.main", words, tmp_path, ranks)
    check(tiny, tmp_path, options, ranks)


def test_resumed_safe(tiny: Path, tmp_path: Path) -> None:
    """One iteration, then two more: the multiplier and the critic of costs continue."""
    options = {
        **SAFE,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "save_steps": 1,
        "micro_batch_size": 2,
    }
    options |= {"actor_learning_rate": 0.003, "critic_learning_rate": 0.005}
    with recorded(tmp_path):
        for steps in (1, 3):
            words = command(tiny, tmp_path, {**options, "max_steps": steps}, PROMPTS)
            succeed("step3_ppo.safe.main", [*words, *costs(tiny, tmp_path, options)], tmp_path)
    parts = check(tiny, tmp_path, options, 1)
    assert sum(isinstance(part, Iteration) for part in parts) == 3


def costs(tiny: Path, folder: Path, options: dict[str, Any]) -> list[str]:
    """Options of the cost: the reward model where it gives no rewards, else a function."""
    if not options.get("reward_model", True):
        return ["--cost_model_name_or_path", str(tiny / "reward")]
    (folder / "costs.py").write_text(FUNCTION)
    return ["--cost_function", f"{folder / 'costs.py'}:late"]


def late(text: str) -> float:
    return sum(letter in "fghij" for letter in text) / 2 - 0.5


def check(tiny: Path, folder: Path, options: dict[str, Any], ranks: int) -> list[Any]:
    cost_scorer = Scorer(function=late)
    if not options.get("reward_model", True):
        cost_scorer = Scorer(tiny / "reward", (0.3, 0.7))
    plain = SafePPO(tiny / "model", scorer_of(tiny, options), cost_scorer, plain_options(options))
    parts = compare(tiny, folder, options, ranks, plain)
    critic, saved = plain.costs.critic, folder / "out/final_cost_critic"
    if options["lora_rank"]:
        compare_adapted(saved, merged(critic, options["lora_rank"], options["lora_alpha"]))
    else:
        compare_weights(saved, critic)
    return parts

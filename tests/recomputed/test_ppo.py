"""Step 3 against plain PyTorch, on the responses that the run has sampled."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import succeed
from tests.recomputed.passes import Pass, passes, recorded, without_padding
from tests.recomputed.plain_ppo import PPO, Iteration, Sampled
from tests.recomputed.plain_sft import Text
from tests.recomputed.tiny import EOS, compare_metrics, compare_weights, ids_of, words, write_records

PROMPTS = ["abc ", "b", "hhhhhhhhhh ", "ad a ", "fab fig ", "cab ", "c ", "a big badge "]
HELD_OUT = ["jab ", "jig a jig ", "j", "jjj "]
DEMONSTRATIONS = [
    ("ebb ", "ice"), ("egg ", "a bad egg"), ("e", "j"), ("edge ", "badge"), ("eee ", "bi bi bi bi"),
    ("ed a ", "fed"), ("efghi ", "j"), ("ece ", "c"),
]  # fmt: skip
LONGEST = 7
OPTIONS = {
    "max_steps": 2, "rollout_batch_size": 8, "global_batch_size": 4, "ppo_epochs": 2,
    "max_response_length": LONGEST, "max_update_kl": 1000, "max_grad_norm": 0.3, "weight_decay": 0.1,
    "actor_learning_rate": 0.02, "critic_learning_rate": 0.03, "adam_epsilon": 0.01, "warmup_ratio": 0,
    "lr_scheduler_type": "linear", "kl_coef": 0.3, "clip_range": 0.1, "value_clip_range": 0.1,
    "score_clip": 0.8, "missing_eos_penalty": 0.4, "advantage_estimator": "gae", "whiten_advantages": "true",
    "gamma": 1.0, "gae_lambda": 0.95, "temperature": 1.0, "dual_clip": 3.0, "repetition_penalty": 0.0,
    "length_penalty": 0.0, "kl_penalty": "reward", "entropy_coef": 0.0,
    "seed": 5, "logging_steps": 1, "eval_steps": 0, "save_steps": 0, "num_samples": 0,
}  # fmt: skip
GROUPS = {"samples_per_prompt": 4}
CASES: dict[str, dict[str, Any]] = {
    "gae": {"gae_lambda": 0.9, "gamma": 0.95, "dual_clip": 0.0},
    "gae_warmup": {
        "critic_warmup_steps": 1, "whiten_rewards": "true", "bootstrap_truncated": "true", "max_steps": 3,
        "kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 20, "normalise_scores": "true",
        "length_penalty": 0.05, "repetition_penalty": 0.5, "dual_clip": 1.2,
    },
    "rloo_ptx": {
        **GROUPS, "advantage_estimator": "rloo", "kl_penalty": "k2", "ptx_coef": 0.5, "ema_decay": 0.7,
    },
    "group": {
        **GROUPS, "advantage_estimator": "group", "group_std": "true", "kl_penalty": "k3",
        "entropy_coef": 0.1, "temperature": 0.8, "top_k": 11, "top_p": 0.9,
    },
    "dr_group": {
        **GROUPS, "advantage_estimator": "group", "group_std": "false", "lr_scheduler_type": "cosine",
    },
    "reinforce": {"advantage_estimator": "reinforce", "reinforce_baseline": "moving", "gamma": 0.9},
    "reinforce_pp": {"advantage_estimator": "reinforce_pp", "gamma": 0.9, "temperature": 1.3},
}  # fmt: skip
SWITCHES = {"true": True, "false": False}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_ppo(tiny: Path, tmp_path: Path, case: str, ranks: int) -> None:
    """Several updates an iteration, responses of uneven length, some of them cut."""
    options = {**OPTIONS, **CASES[case], "micro_batch_size": 2 // ranks}
    paths = {
        "prompt_data": write_records(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS]),
        "eval_data": write_records(tmp_path / "held_out.jsonl", [{"prompt": p} for p in HELD_OUT]),
        "actor_model_name_or_path": tiny / "model", "reward_model_name_or_path": tiny / "reward",
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    if "ptx_coef" in options:
        records = [{"prompt": prompt, "completion": completion} for prompt, completion in DEMONSTRATIONS]
        paths["ptx_data"] = write_records(tmp_path / "demonstrations.jsonl", records)
    with recorded(tmp_path):
        succeed("step3_ppo.main", words({**options, **paths}), tmp_path, ranks)

    plain = PPO(
        tiny / "model", tiny / "reward", (0.3, 0.7), {k: SWITCHES.get(v, v) for k, v in options.items()}
    )
    first, *iterations, last = split([passes(tmp_path, rank) for rank in range(ranks)], options)
    lines = [plain.evaluate(0, first)]
    lines += [plain.iterate(step, sampled) for step, sampled in enumerate(iterations, start=1)]
    compare_metrics(tmp_path / "out", [*lines, plain.evaluate(options["max_steps"], last)])
    compare_weights(tmp_path / "out/final", plain.actor)
    if plain.has_critic:
        compare_weights(tmp_path / "out/final_critic", plain.critic)
    if plain.average:
        plain.actor.load_state_dict(plain.average)
        compare_weights(tmp_path / "out/final_ema", plain.actor)


def split(of_ranks: list[list[Pass]], options: dict[str, Any]) -> list[Any]:
    """The first evaluation, every iteration and the last evaluation, from the passes of all ranks."""
    parts: list[list[list[Pass]]] = [[] for _ in of_ranks]
    for rank, every in enumerate(of_ranks):
        for number, one in enumerate(every):
            if one.is_sampling and not (number and every[number - 1].is_sampling):
                parts[rank].append([])
            if parts[rank]:
                parts[rank][-1].append(one)
    assert {len(part) for part in parts} == {options["max_steps"] + 2}
    first, *iterations, last = ([*part] for part in zip(*parts, strict=True))
    return [held_out(first), *(iteration(part, options) for part in iterations), held_out(last)]


def rows_of(part: list[Pass], prompts: list[str]) -> list[Sampled]:
    """Rows of some passes, each a prompt and a response."""
    starts = {tuple(ids_of(prompt)) for prompt in prompts}
    rows = []
    for row in (row for one in part for row in one.input_ids):
        prompt = max((p for p in starts if tuple(row[: len(p)]) == p), key=len)
        ids = without_padding(row, len(prompt), LONGEST)
        rows.append(Sampled(prompt, tuple(ids[len(prompt) :])))
    return rows


def held_out(part: list[list[Pass]]) -> list[Sampled]:
    """The responses to held-out prompts, as the reference has read them."""
    read = [one for of_rank in part for one in of_rank if one.is_policy and not one.is_sampling]
    rows = rows_of(read, HELD_OUT)
    assert sorted(row.prompt for row in rows) == sorted(tuple(ids_of(prompt)) for prompt in HELD_OUT)
    return rows


def iteration(part: list[list[Pass]], options: dict[str, Any]) -> Iteration:
    """An iteration from the passes of all ranks: the critic's, or else the actor's, with gradients."""
    rounds = options["global_batch_size"] // options["micro_batch_size"] // len(part)
    has_critic, has_texts = options["advantage_estimator"] == "gae", "ptx_coef" in options
    batches, texts = [], []
    trained = [
        [one for one in of_rank if one.has_gradient and one.is_policy != has_critic] for of_rank in part
    ]
    updates = len(trained[0]) // rounds
    for update in range(updates):
        own = [one for of_rank in trained for one in of_rank[update * rounds : (update + 1) * rounds]]
        if has_texts and update % 2 == 0:
            texts.append(demonstrations(own))
        else:
            batches.append(rows_of(own, PROMPTS))
    epoch = options["rollout_batch_size"] // options["global_batch_size"]
    assert len(batches) == options["ppo_epochs"] * epoch
    rollouts = [
        Counter(row for batch in batches[start : start + epoch] for row in batch)
        for start in range(0, len(batches), epoch)
    ]
    assert all(rollout == rollouts[0] for rollout in rollouts), "every epoch trains on every response"
    per_prompt = Counter(row.prompt for row in rollouts[0].elements())
    assert {*per_prompt.values()} == {options.get("samples_per_prompt", 1)}
    computed = sum(one.positions for of_rank in part for one in of_rank if one.is_sampling)
    return Iteration(batches, texts, computed)


def demonstrations(part: list[Pass]) -> list[Text]:
    known = [Text([*ids_of(prompt + completion), EOS], len(prompt)) for prompt, completion in DEMONSTRATIONS]
    rows = [row for one in part for row in one.input_ids]
    return [next(text for text in known if text.ids == row[: len(text.ids)]) for row in rows]

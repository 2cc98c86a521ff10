"""Step 3 against plain PyTorch, on the responses that the run has sampled."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, assert_close
from tests.ranks import succeed
from tests.recomputed.passes import Pass, check_budget, passes, recorded, without_padding
from tests.recomputed.plain import merged
from tests.recomputed.plain_ppo import PPO, Iteration, Sampled, Scorer
from tests.recomputed.plain_sft import Text
from tests.recomputed.tiny import (
    EOS,
    compare_adapted,
    compare_metrics,
    compare_weights,
    ids_of,
    logged,
    text_of,
    words,
    write_records,
)

PROMPTS = ["abc ", "b", "hhhhhhhhhh ", "ad a ", "fab fig ", "cab ", "c ", "a big badge "]
MORE_PROMPTS = ["d", "dab ", "dig a d", "dd ", "didi ", "ice ", "ig", "iii "]
HELD_OUT = ["jab ", "jig a jig ", "j"]
FUNCTION = """
def early(prompts, responses, records):
    return [sum(letter in "abcde" for letter in response) / 4 for response in responses]
"""
DEMONSTRATIONS = [
    ("ebb ", "ice"), ("egg ", "a bad egg"), ("e", "j"), ("edge ", "badge"), ("eee ", "bi bi bi bi"),
    ("ed a ", "fed"), ("efghi ", "j"), ("ece ", "c"), ("ea", "eb"),
    ("ej ", "jjjj"), ("eh ", "h h h h"), ("eg", "gg"),
]  # fmt: skip
LONGEST, LONGEST_PROMPT = 7, 12
LONGEST_TEXT = LONGEST_PROMPT + LONGEST + 1  # with the EOS at which a cut response is scored
OPTIONS = {
    "max_steps": 2, "rollout_batch_size": 8, "global_batch_size": 4, "ppo_epochs": 2,
    "max_response_length": LONGEST, "max_update_kl": 1000, "max_grad_norm": 0.3, "weight_decay": 0.1,
    "actor_learning_rate": 0.01, "critic_learning_rate": 0.02, "adam_epsilon": 0.01, "warmup_ratio": 0,
    "lr_scheduler_type": "linear", "kl_coef": 0.3, "clip_range": 0.1, "value_clip_range": 0.1,
    "score_clip": 0.8, "missing_eos_penalty": 0.4, "advantage_estimator": "gae", "whiten_advantages": "true",
    "gamma": 1.0, "gae_lambda": 0.95, "temperature": 1.0, "dual_clip": 3.0, "repetition_penalty": 0.0,
    "length_penalty": 0.0, "kl_penalty": "reward", "entropy_coef": 0.0, "lora_rank": 0, "lora_alpha": 6,
    "max_prompt_length": LONGEST_PROMPT + 2, "seed": 5, "logging_steps": 1, "eval_steps": 0, "save_steps": 0,
}  # fmt: skip
ZERO_3 = REPOSITORY / "common/zero_configs/zero3.json"
GROUPS = {"samples_per_prompt": 4, "rollout_batch_size": 16}
SHARED = {**GROUPS, "share_prompts": "yes", "global_batch_size": 8, "micro_batch_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "gae": {"gae_lambda": 0.9, "gamma": 0.95, "dual_clip": 0.0},
    "gae_warmup": {
        "critic_warmup_steps": 1, "whiten_rewards": "true", "bootstrap_truncated": "true", "max_steps": 3,
        "kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 20, "normalise_scores": "sum",
        "length_penalty": 0.05, "repetition_penalty": 0.5, "dual_clip": 1.2, "ptx_coef": 0.3,
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
        "actor_learning_rate": 0.005,
    },
    "reinforce": {
        "advantage_estimator": "reinforce", "reinforce_baseline": "moving", "gamma": 0.9, "max_steps": 3,
    },
    "reinforce_pp": {
        "advantage_estimator": "reinforce_pp", "gamma": 0.9, "temperature": 1.3, "function_weight": 0.5,
    },
    "function": {"function_weight": -2.0, "reward_model": False},
    "each": {"function_weight": -2.0, "normalise_scores": "each", "score_clip": 2.0},
    "lora": {"lora_rank": 2},
    "tokens": {"micro_batch_tokens": 45, "ptx_coef": 0.5, "max_steps": 3},
    "sequence": {
        **GROUPS, "advantage_estimator": "group", "group_std": "true", "loss_aggregation": "sequence",
        "clip_range_high": 0.14, "kl_penalty": "k2", "entropy_coef": 0.1, "mask_truncated": "true",
    },
    "constant": {
        "advantage_estimator": "reinforce_pp", "loss_aggregation": "constant", "micro_batch_tokens": 45,
    },
    "gspo": {
        **GROUPS, "advantage_estimator": "group", "group_std": "true", "policy_loss": "gspo",
        "loss_aggregation": "sequence", "clip_range": 0.003, "clip_range_high": 0.004,
    },
    "cispo": {"policy_loss": "cispo", "clip_range": 1.0, "clip_range_high": 0.1},
    "lambdas": {"critic_gae_lambda": 1.0, "length_adaptive_lambda": 0.4, "bootstrap_truncated": "true"},
    "warmup_until": {"critic_warmup_steps": 2, "critic_warmup_until": 0.01, "max_steps": 3},
    "entropy_band": {
        "entropy_coef": 0.05, "entropy_low": 9.0, "entropy_high": 10.0, "entropy_coef_step": 0.2,
        "max_steps": 3,
    },
    "above_band": {
        "entropy_coef": 0.5, "entropy_low": 0.1, "entropy_high": 0.2, "entropy_coef_step": 0.1,
        "max_steps": 2,
    },
    "masked": {
        "mask_truncated": "true", "overlong_buffer": 4, "overlong_penalty": 0.6, "ptx_coef": 0.3,
    },
    "shared": {
        **SHARED, "bootstrap_truncated": "true", "temperature": 0.9, "top_k": 9, "function_weight": 0.5,
        "ptx_coef": 0.5, "entropy_coef": 0.1,
    },
    "shared_lora": {**SHARED, "advantage_estimator": "rloo", "kl_penalty": "k2", "lora_rank": 2},
    "shared_tokens": {**SHARED, "micro_batch_tokens": 60},
    "shared_zero3": {**SHARED, "advantage_estimator": "rloo", "zero_config": ZERO_3, "max_steps": 1},
    "separate": {**SHARED, "share_prompts": "no"},
    "stopped": {"advantage_estimator": "reinforce_pp", "max_update_kl": 0.01},
}  # fmt: skip
RESUMED = {
    "max_steps": 3, "lr_scheduler_type": "constant", "normalise_scores": "sum", "ptx_coef": 0.5,
    "kl_controller": "adaptive", "kl_target": 0.5, "kl_horizon": 20, "ema_decay": 0.7, "save_steps": 1,
    "actor_learning_rate": 0.003, "critic_learning_rate": 0.005,
    "micro_batch_size": 2,
}  # fmt: skip
SHARED_BY: dict[str, list[set[int]]] = {  # responses per row, on one and two ranks
    "shared": [{4}, {2}], "shared_lora": [{4}, {2}], "shared_tokens": [{4}, {4}],
    "shared_zero3": [{4}, {2}], "separate": [set(), set()],
}  # fmt: skip
SWITCHES = {"true": True, "false": False}
OF_THE_TEST = ("reward_model", "function_weight")  # no options


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_ppo(tiny: Path, tmp_path: Path, case: str, ranks: int) -> None:
    """Several updates an iteration, responses of uneven length, some of them cut."""
    options = {**OPTIONS, **CASES[case]}
    options["micro_batch_size"] = options.get("micro_batch_size", 2) // ranks
    with recorded(tmp_path):
        succeed("step3_ppo.main", command(tiny, tmp_path, options, PROMPTS), tmp_path, ranks)
    if "micro_batch_tokens" in options:
        check_budget([passes_of(tmp_path, rank) for rank in range(ranks)], options["micro_batch_tokens"])
    compare(tiny, tmp_path, options, ranks)
    if "share_prompts" in options:
        shared = [one for rank in range(ranks) for one in passes_of(tmp_path, rank) if one.position_ids]
        assert {one.responses / len(one.input_ids) for one in shared} == SHARED_BY[case][ranks - 1]
        kinds = {(one.is_policy, one.has_gradient) for one in shared}
        assert not shared or kinds >= {(True, True), (True, False), (False, False)}


@pytest.mark.parametrize(
    "more", [{}, {"normalise_scores": "each", "function_weight": 0.5}], ids=["sum", "each"]
)
def test_resumed_ppo(tiny: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """One iteration, then two more: data, demonstrations, coefficient, scales of scores and average go on."""
    options = {**OPTIONS, **RESUMED, **more}
    prompts = PROMPTS + MORE_PROMPTS  # two iterations
    with recorded(tmp_path):
        for steps in (1, 3):
            words = command(tiny, tmp_path, {**options, "max_steps": steps}, prompts)
            succeed("step3_ppo.main", words, tmp_path)
    parts = compare(tiny, tmp_path, options, 1)
    first, second, third = (part for part in parts if isinstance(part, Iteration))
    prompts_read = [row.prompt for row in first.rows + second.rows]
    assert sorted(prompts_read) == sorted(tuple(ids_of(prompt)) for prompt in prompts)
    texts = [str(text) for part in (first, second, third) for batch in part.texts for text in batch]
    for start in range(0, len(texts), len(DEMONSTRATIONS)):
        assert len({*texts[start : start + len(DEMONSTRATIONS)]}) == len(DEMONSTRATIONS)


def test_numbers_are_those_without_shared_prompts(tiny: Path, tmp_path: Path) -> None:
    """With the same minibatches, and accumulation of gradients."""
    for how in ("no", "yes"):
        (tmp_path / how).mkdir()
        options = {**OPTIONS, **CASES["shared"], "share_prompts": how}
        succeed("step3_ppo.main", command(tiny, tmp_path / how, options, PROMPTS), tmp_path / how)
    compare_metrics(tmp_path / "yes/out", logged(tmp_path / "no/out"))
    for name in ("final", "final_critic"):
        weights = [load_file(tmp_path / how / "out" / name / "model.safetensors") for how in ("yes", "no")]
        assert_close(*weights)


def command(tiny: Path, folder: Path, options: dict[str, Any], prompts: list[str]) -> list[str]:
    """The command line of a run."""
    paths = {
        "prompt_data": write_records(folder / "prompts.jsonl", [{"prompt": p} for p in prompts]),
        "eval_data": write_records(folder / "held_out.jsonl", [{"prompt": p} for p in HELD_OUT]),
        "actor_model_name_or_path": tiny / "model", "output_dir": folder / "out",
    }  # fmt: skip
    if options.get("reward_model", True):
        paths["reward_model_name_or_path"] = tiny / "reward"
    if "function_weight" in options:
        (folder / "functions.py").write_text(FUNCTION)
        paths["reward_function"] = f"{folder / 'functions.py'}:early:{options['function_weight']}"
    if "ptx_coef" in options:
        records = [{"prompt": prompt, "completion": completion} for prompt, completion in DEMONSTRATIONS]
        paths["ptx_data"] = write_records(folder / "demonstrations.jsonl", records)
    return words({name: value for name, value in options.items() if name not in OF_THE_TEST} | paths)


def scorer_of(tiny: Path, options: dict[str, Any]) -> Scorer:
    """What scores the responses of a run."""
    scorer = Scorer(tiny / "reward", (0.3, 0.7)) if options.get("reward_model", True) else Scorer()
    if "function_weight" in options:
        scorer = scorer._replace(function=early, weight=options["function_weight"])
    return scorer


def compare(
    tiny: Path, folder: Path, options: dict[str, Any], ranks: int, plain: PPO | None = None
) -> list[Any]:
    """Recompute a run from its passes, with another form of `plain` PPO if given; returns its iterations and
    evaluations.
    """
    if plain is None:
        plain = PPO(tiny / "model", scorer_of(tiny, options), plain_options(options))
    lines, step, parts = [], 0, split([passes_of(folder, rank) for rank in range(ranks)], options)
    samples = [json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines()]
    for number, part in enumerate(parts):
        if isinstance(part, Iteration):
            step += 1
            lines.append(plain.iterate(step, part))
        else:
            of_step, samples = samples[: len(HELD_OUT)], samples[len(HELD_OUT) :]
            parts[number] = as_logged(part, of_step)
            lines.append(plain.evaluate(step, parts[number]))
            expected = [plain.score(plain.read(row)) for row in parts[number]]
            assert [sample["score"] for sample in of_step] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    compare_metrics(folder / "out", lines)
    models = {"final": plain.actor} | ({"final_critic": plain.critic} if plain.has_critic else {})
    for name, model in models.items():
        if options["lora_rank"]:
            weights = merged(model, options["lora_rank"], options["lora_alpha"])
            compare_adapted(folder / "out" / name, weights)
        else:
            compare_weights(folder / "out" / name, model)
    if plain.average:
        plain.actor.load_state_dict(plain.average)
        compare_weights(folder / "out/final_ema", plain.actor)
    return parts


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: SWITCHES.get(x, x) for name, x in options.items()}


def early(text: str) -> float:
    return sum(letter in "abcde" for letter in text) / 4


def passes_of(folder: Path, rank: int) -> list[Pass]:
    """The passes of a rank, without those of random tokens that show whether a model can share prompts.

    There are two for each model, the first one with rows that are longer than any of the run.
    """
    every = iter(passes(folder, rank))
    result = []
    for one in every:
        if not one.is_sampling and len(one.input_ids[0]) > LONGEST_TEXT and not one.position_ids:
            next(every)
        else:
            result.append(one)
    return result


def split(of_ranks: list[list[Pass]], options: dict[str, Any]) -> list[Any]:
    """Iterations, and rows of evaluations, in order. Each starts with sampling."""
    parts: list[list[list[Pass]]] = [[] for _ in of_ranks]
    for rank, every in enumerate(of_ranks):
        for number, one in enumerate(every):
            if one.is_sampling and not (number and every[number - 1].is_sampling):
                parts[rank].append([])
            parts[rank][-1].append(one)
    return [
        iteration([*part], options) if any(one.has_gradient for one in part[0]) else held_out([*part])
        for part in zip(*parts, strict=True)
    ]


def rows_of(part: list[Pass], prompts: list[str]) -> list[Sampled]:
    """Rows of some passes, each a prompt and a response, or several that share a prompt."""
    known = {tuple(ids_of(prompt)) for prompt in prompts}
    rows = []
    for one in part:
        for row, positions in zip(one.input_ids, one.position_ids or itertools.repeat(None)):  # noqa: B905
            prompt = max((p for p in known if tuple(row[: len(p)]) == p), key=len)
            starts = [len(prompt)]
            if positions:
                starts = [c for c in range(len(prompt), len(row)) if positions[c] == len(prompt)]
            ends = [without_padding(row, start, LONGEST) for start in starts]
            rows += [Sampled(prompt, tuple(ids[s:])) for s, ids in zip(starts, ends, strict=True)]
    return rows


def read_by_reference(of_rank: list[Pass]) -> list[Pass]:
    """The reference reads every response once, before the first update."""
    passes = itertools.takewhile(lambda one: not one.has_gradient, of_rank)
    return [one for one in passes if one.is_policy and not one.is_sampling]


def read_after_updates(of_rank: list[Pass]) -> list[Pass]:
    """The actor reads a few responses once more, after its last update."""
    passes = itertools.takewhile(lambda one: not (one.has_gradient and one.is_policy), reversed(of_rank))
    return [one for one in passes if one.is_policy and not one.is_sampling]


def held_out(part: list[list[Pass]]) -> list[Sampled]:
    return rows_of([one for of_rank in part for one in read_by_reference(of_rank)], HELD_OUT)


def as_logged(rows: list[Sampled], samples: list[dict[str, Any]]) -> list[Sampled]:
    """The rows in samples.jsonl; ranks may have sampled a prompt twice, so that each had as many rows."""
    logged = []
    for prompt, sample in zip(HELD_OUT, samples, strict=True):
        assert sample["prompt"] == prompt
        same = (sample["response"], sample["length"], sample["ended"])
        logged += [
            row
            for row in dict.fromkeys(rows)
            if row.prompt == tuple(ids_of(prompt))
            and (text_of(row.response), len(row.response), row.ended) == same
        ]
    assert len(logged) == len(HELD_OUT)
    return logged


def iteration(part: list[list[Pass]], options: dict[str, Any]) -> Iteration:
    """Minibatches are those of the critic, or else of the actor; before each there may be demonstrations."""
    size = options["global_batch_size"]
    has_critic = options["advantage_estimator"] == "gae"
    actor, critic = (updates(part, size, is_policy=is_policy) for is_policy in (True, False))
    texts = []
    if "ptx_coef" in options:
        texts, actor = [demonstrations(batch) for batch in actor[::2]], actor[1::2]
    batches = [rows_of(batch, PROMPTS + MORE_PROMPTS) for batch in (critic if has_critic else actor)]
    if "cost_limit" in options:  # the critic of costs, after the other one
        half = len(batches) // 2
        assert [Counter(batch) for batch in batches[:half]] == [Counter(batch) for batch in batches[half:]]
        batches = batches[:half]
    rows = rows_of([one for of_rank in part for one in read_by_reference(of_rank)], PROMPTS + MORE_PROMPTS)
    assert len(rows) == options["rollout_batch_size"]
    assert {*Counter(row.prompt for row in rows).values()} == {options.get("samples_per_prompt", 1)}
    epoch = options["rollout_batch_size"] // options["global_batch_size"]
    for start in range(0, len(batches) - epoch + 1, epoch):
        trained = [row for batch in batches[start : start + epoch] for row in batch]
        assert Counter(trained) == Counter(rows), "every epoch trains on every response"
    if len(rows) == len({*rows}) and len(batches) > epoch:
        assert {*batches[0]} != {*batches[epoch]}, "the epochs have other minibatches"
    measured = rows_of(
        [one for of_rank in part for one in read_after_updates(of_rank)], PROMPTS + MORE_PROMPTS
    )
    computed = sum(one.positions for of_rank in part for one in of_rank if one.is_sampling)
    return Iteration(rows, batches, [*dict.fromkeys(measured)], texts, computed)


def updates(part: list[list[Pass]], size: int, is_policy: bool) -> list[list[Pass]]:
    """The passes with gradients of all ranks, by update of `size` rows."""
    trained = [
        [one for one in of_rank if one.has_gradient and one.is_policy == is_policy] for of_rank in part
    ]
    batches: list[list[Pass]] = []
    for of_round in zip(*trained, strict=True):
        if not batches or sum(one.responses for one in batches[-1]) == size:
            batches.append([])
        batches[-1] += of_round
    assert {sum(one.responses for one in batch) for batch in batches} <= {size}  # none without a critic
    return batches


def demonstrations(part: list[Pass]) -> list[Text]:
    known = [Text([*ids_of(prompt + completion), EOS], len(prompt)) for prompt, completion in DEMONSTRATIONS]
    rows = [row for one in part for row in one.input_ids]
    return [next(text for text in known if text.ids == row[: len(text.ids)]) for row in rows]

"""Step 2, the reward model, against plain PyTorch."""

import json
from pathlib import Path

import pytest
from torch import nn

from tests.ranks import succeed
from tests.recomputed.passes import check_budget, passes, recorded
from tests.recomputed.plain import merged
from tests.recomputed.plain_reward import Compared, train
from tests.recomputed.tiny import (
    EOS,
    PAD,
    compare_adapted,
    compare_metrics,
    compare_weights,
    ids_of,
    words,
    write_records,
)

PREFERENCES = [
    {"prompt": "abc ", "chosen": "de", "rejected": "a a a a", "margin": 0.5},
    {"prompt": "b", "chosen": "aaaaaab", "rejected": "b", "margin": 1.0},
    {"prompt": "hhhhhhhhhh ", "responses": ["ij", "ha ha", "jijijiji"], "ranks": [1, 3, 2]},
    {"prompt": "ad a ", "response_a": "bad bed", "response_b": "c", "preference": "B"},
    {"prompt": "fab fig ", "response_a": "hi hide", "response_b": "hi", "preference": "tie", "margin": 2.0},
    {"prompt": "cab ", "responses": ["ice", "c", "ababab"], "ranks": [2, 1, 2]},
    {"prompt": "c ", "chosen": "jade gig did", "rejected": "j", "margin": 0.25},
    {"prompt": "a big badge ", "chosen": "cage", "rejected": "cafe"},
]
HELD_OUT = [
    {"prompt": "abba ", "chosen": "dad", "rejected": "did", "margin": 0.5},
    {"prompt": "egg ", "responses": ["fed a high bid", "i", "a"], "ranks": [1, 2, 2]},
    {"prompt": "if ", "chosen": "ijij", "rejected": "i"},
]
OPTIONS = {
    "max_steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.02,
    "lr_scheduler_type": "linear", "warmup_ratio": 0, "weight_decay": 0.2, "adam_epsilon": 0.01,
    "max_grad_norm": 0.5, "label_smoothing": 0.1, "centre_coef": 0.05, "lm_loss_coef": 0.3,
    "share_prompts": "yes", "seed": 3, "lora_rank": 0, "lora_alpha": 6,
    "logging_steps": 1, "eval_steps": 0, "save_steps": 0,
}  # fmt: skip


def tokens(record: dict) -> Compared:
    """The record with its responses best first."""
    prompt, margin = ids_of(record["prompt"]), record.get("margin", 0.0)
    if "chosen" in record:
        texts, ranks = [record["chosen"], record["rejected"]], [1, 2]
    elif "responses" in record:
        ranks = sorted(record["ranks"])
        order = sorted(range(len(ranks)), key=lambda number: record["ranks"][number])
        texts = [record["responses"][number] for number in order]
    else:
        texts, ranks = [record["response_a"], record["response_b"]], [1, 2]
        if record["preference"] == "B":
            texts.reverse()
        if record["preference"] == "tie":
            ranks = [1, 1]
    signs = [
        2 * record[f"{side}_is_harmful"] - 1
        for side in ("chosen", "rejected")
        if f"{side}_is_harmful" in record
    ]
    if signs and record.get("safer") != "rejected":  # the more harmful response is first
        texts, signs = texts[::-1], signs[::-1]
    return Compared(prompt, [[*ids_of(text), EOS] for text in texts], ranks, margin, tuple(signs))


@pytest.mark.parametrize(("ranks", "share_prompts"), [(1, "yes"), (2, "no")])
def test_reward_model(tiny: Path, tmp_path: Path, ranks: int, share_prompts: str) -> None:
    """Pairs with margins, ties and ranked responses; smoothing, centring and a language-model loss."""
    model = compare(tiny, tmp_path, ranks, {**OPTIONS, "share_prompts": share_prompts})
    compare_weights(tmp_path / "out/final", model)


@pytest.mark.parametrize(("ranks", "share_prompts"), [(1, "no"), (2, "yes")])
def test_reward_model_by_tokens(tiny: Path, tmp_path: Path, ranks: int, share_prompts: str) -> None:
    """Micro-batches of up to 80 tokens of all rows of their records."""
    options = {**OPTIONS, "share_prompts": share_prompts}
    with recorded(tmp_path):
        model = compare(tiny, tmp_path, ranks, options, budget=80)
    compare_weights(tmp_path / "out/final", model)


def test_adapted_reward_model(tiny: Path, tmp_path: Path) -> None:
    """With LoRA, final/ is merged."""
    options = {**OPTIONS, "lora_rank": 2}
    model = compare(tiny, tmp_path, 1, options)
    compare_adapted(tmp_path / "out/final", merged(model, options["lora_rank"], options["lora_alpha"]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_cost_model(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """Pairs with signs, the more harmful response first; its zero is not shifted."""
    options = {**OPTIONS, "centre_coef": 0, "lm_loss_coef": 0, "objective": "cost"}
    model = compare(tiny, tmp_path, ranks, options, data=(COSTS[:8], COSTS[8:]))
    compare_weights(tmp_path / "out/final", model)


def with_harm(record: dict, chosen: bool, rejected: bool, **more: str) -> dict:
    return {**record, "chosen_is_harmful": chosen, "rejected_is_harmful": rejected, **more}


COSTS = [
    with_harm({"prompt": "abc ", "chosen": "de", "rejected": "a a a a"}, False, True),
    with_harm({"prompt": "b", "chosen": "aaaaaab", "rejected": "b"}, False, False),
    with_harm({"prompt": "hhhhhhhhhh ", "chosen": "ij", "rejected": "ha ha"}, True, False, safer="rejected"),
    with_harm({"prompt": "ad a ", "chosen": "bad bed", "rejected": "c"}, True, True),
    with_harm({"prompt": "fab fig ", "chosen": "hi hide", "rejected": "hi"}, False, True),
    with_harm({"prompt": "cab ", "chosen": "ice", "rejected": "ababab"}, True, True, safer="rejected"),
    with_harm({"prompt": "c ", "chosen": "jade gig did", "rejected": "j"}, False, True, safer="chosen"),
    with_harm({"prompt": "a big badge ", "chosen": "cage", "rejected": "cafe"}, False, False),
    with_harm({"prompt": "abba ", "chosen": "dad", "rejected": "did"}, False, True),
    with_harm({"prompt": "if ", "chosen": "ijij", "rejected": "i"}, True, False, safer="rejected"),
]


def compare(
    tiny: Path,
    folder: Path,
    ranks: int,
    options: dict,
    budget: int = 0,
    data: tuple = (PREFERENCES, HELD_OUT),
) -> nn.Module:
    """Run both, and compare all but the weights; returns the plain model. budget: tokens of a micro-batch."""
    paths = {
        "train_data": write_records(folder / "train.jsonl", data[0]),
        "eval_data": write_records(folder / "eval.jsonl", data[1]),
        "model_name_or_path": tiny / "model", "output_dir": folder / "out",
    }  # fmt: skip
    succeed(
        "step2_reward.main",
        [
            *words({**options, **paths, "micro_batch_tokens": budget}),
            *["--use_margin"] * (data[0] is PREFERENCES),
        ],
        folder,
        ranks,
    )
    records, held_out = ([*map(tokens, part)] for part in data)
    model, lines, centre = train(tiny / "model", records, held_out, options, options["seed"])
    if budget:
        of_ranks = [[one for one in passes(folder, rank) if one.has_gradient] for rank in range(ranks)]
        check_budget(of_ranks, budget)
        read = [one for of_rank in of_ranks for one in of_rank]
        padding = sum(row.count(PAD) for one in read for row in one.input_ids)
        share = {"train/padding_share": padding / sum(one.positions for one in read)}
        lines = [{**line, **share} if "train/loss" in line else line for line in lines]
    compare_metrics(folder / "out", lines)
    config = json.loads((folder / "out/final/config.json").read_text())
    expected = (0.0, 1.0) if "objective" in options else pytest.approx(centre, rel=1e-5)
    assert (config["reward_mean"], config["reward_std"]) == expected
    return model

"""Step 2, direct losses, against plain PyTorch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import succeed
from tests.recomputed.passes import check_budget, passes, recorded, without_padding
from tests.recomputed.plain_direct import WITHOUT_REFERENCE, Answer, Compared, Labelled, train, train_kto
from tests.recomputed.tiny import (
    EOS,
    compare_metrics,
    compare_weights,
    ids_of,
    logged,
    words,
    write_records,
)

PREFERENCES = [
    {"prompt": "abc ", "chosen": "de", "rejected": "a a a a"},
    {"prompt": "b", "chosen": "aaaaaab", "rejected": "b"},
    {"prompt": "hhhhhhhhhh ", "responses": ["ij", "ha ha", "jijijiji"], "ranks": [3, 1, 2]},
    {"prompt": "ad a ", "chosen": "bad bed", "rejected": "c"},
    {"prompt": "fab fig ", "response_a": "hi hide", "response_b": "hi", "preference": "tie"},
    {"prompt": "cab ", "responses": ["ice", "c", "ababab"], "ranks": [2, 1, 2]},
    {"prompt": "c ", "chosen": "jade gig did", "rejected": "j"},
    {"prompt": "a big badge ", "chosen": "cage", "rejected": "cafe"},
]
HELD_OUT = [
    {"prompt": "abba ", "chosen": "dad", "rejected": "did"},
    {"prompt": "egg ", "responses": ["fed a high bid", "i", "a"], "ranks": [1, 2, 2]},
    {"prompt": "if ", "chosen": "ijij", "rejected": "i"},
]
LABELLED = [
    {"prompt": "abc ", "completion": "de", "label": True},
    {"prompt": "b", "completion": "aaaaaab", "label": True},
    {"prompt": "hhhhhhhhhh ", "completion": "jijijiji", "label": False},
    {"prompt": "ad a ", "completion": "bad bed", "label": True},
    {"prompt": "fab fig ", "completion": "hi hide", "label": False},
    {"prompt": "cab ", "completion": "ice", "label": False},
    {"prompt": "c ", "completion": "jade gig did", "label": True},
    {"prompt": "a big badge ", "completion": "cage", "label": True},
]
LABELLED_HELD_OUT = [
    {"prompt": "abba ", "completion": "dad", "label": True},
    {"prompt": "egg ", "completion": "fed a high bid", "label": False},
    {"prompt": "if ", "completion": "ijij", "label": True},
]
OPTIONS = {
    "max_steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.02,
    "lr_scheduler_type": "linear", "warmup_ratio": 0, "weight_decay": 0.2, "adam_epsilon": 0.01,
    "max_grad_norm": 0.5, "logging_steps": 1, "eval_steps": 0, "save_steps": 0,
}  # fmt: skip
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"beta": 0.2},
    "orpo": {"beta": 0.4, "nll_coef": 0.7},
    "simpo": {"beta": 1.5, "gamma_beta_ratio": 0.4, "label_smoothing": 0.05},
    "hinge": {"beta": 0.3},
    "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "cpo": {"beta": 0.2, "nll_coef": 0.6, "label_smoothing": 0.1},
    "simpo_hinge": {"beta": 1.5, "gamma_beta_ratio": 0.4},
    "cpo_hinge": {"beta": 0.2, "nll_coef": 0.6},
    "sigmoid_norm": {"beta": 1.5},
    "exo_pair": {"beta": 0.3, "label_smoothing": 0.01},
    "discopop": {"beta": 0.3, "discopop_temperature": 0.2},
    "nca_pair": {"beta": 0.3},
    "bco_pair": {"beta": 0.3},
    "sppo_hard": {"beta": 0.2},
    "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3},
    "aot": {"beta": 0.3, "label_smoothing": 0.1},
    "aot_unpaired": {"beta": 0.3},
    "shift": {"loss": "bco_pair", "beta": 0.3, "bco_shift": True},
    "alphapo": {"loss": "simpo", "beta": 1.5, "gamma_beta_ratio": 0.4, "alphapo_alpha": 0.25},
    "forward_kl": {"loss": "dpo", "beta": 0.3, "f_divergence": "forward_kl"},
    "js": {"loss": "ipo", "beta": 0.2, "f_divergence": "js_divergence"},
    "alpha": {"loss": "hinge", "beta": 0.3, "f_divergence": "alpha_divergence", "f_divergence_alpha": 0.9},
    "length": {"loss": "dpo", "beta": 0.3, "ld_alpha": 0.4},
    "weights": {"loss": "dpo", "beta": 0.3, "wpo": True},
}
# Formulas of one pair, which nothing on another rank can change: on one rank.
LIKE_DPO = {
    "simpo_hinge", "cpo_hinge", "sigmoid_norm", "exo_pair", "discopop", "nca_pair", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "alphapo", "forward_kl", "js", "alpha",
}  # fmt: skip


def answer(prompt: str, text: str) -> Answer:
    return Answer([*ids_of(prompt + text), EOS], len(prompt))


def compared(record: dict) -> Compared:
    if "responses" in record:
        by_rank = sorted(zip(record["ranks"], record["responses"], strict=True), key=lambda one: one[0])
        ranks, texts = zip(*by_rank, strict=True)
    elif "chosen" in record:
        texts, ranks = [record["chosen"], record["rejected"]], [1, 2]
    else:
        texts, ranks = [record["response_a"], record["response_b"]], [1, 1]
    return Compared([answer(record["prompt"], text) for text in texts], ranks)


def pair(record: dict) -> dict:
    """The record with its first two responses alone, the first one better."""
    names = ("response_a", "response_b") if "response_a" in record else ("chosen", "rejected")
    texts = record["responses"][:2] if "responses" in record else [record[name] for name in names]
    return {"prompt": record["prompt"], "chosen": texts[0], "rejected": texts[1]}


def run(tiny: Path, folder: Path, options: dict[str, Any], train_data: list, eval_data: list) -> list[str]:
    """The command line of a run on these records."""
    paths = {
        "train_data": write_records(folder / "train.jsonl", train_data),
        "eval_data": write_records(folder / "eval.jsonl", eval_data),
        "model_name_or_path": tiny / "model", "output_dir": folder / "out",
    }  # fmt: skip
    return words({**options, **paths})


@pytest.mark.parametrize(
    ("loss", "ranks"),
    [(loss, ranks) for loss in LOSSES for ranks in (1, 2) if ranks == 1 or loss not in LIKE_DPO],
)
def test_direct_loss(tiny: Path, tmp_path: Path, loss: str, ranks: int) -> None:
    """Pairs, ranked responses and ties of uneven length."""
    options = {**OPTIONS, "loss": loss, **LOSSES[loss]}
    if options["loss"] not in WITHOUT_REFERENCE:
        options["reference_model_name_or_path"] = tiny / "reference"
    parts = [PREFERENCES, HELD_OUT]
    if loss in ("aot", "aot_unpaired"):
        parts = [[*map(pair, part)] for part in parts]
    succeed("step2_reward.direct.main", run(tiny, tmp_path, options, *parts), tmp_path, ranks)
    records = [[*map(compared, part)] for part in parts]
    model, lines = train((tiny / "model", tiny / "reference"), *records, options)
    compare_metrics(tmp_path / "out", lines)
    compare_weights(tmp_path / "out/final", model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_direct_loss_by_tokens(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """Micro-batches of up to 70 tokens of all responses of their records."""
    options = {**OPTIONS, **LOSSES["dpo"], "reference_model_name_or_path": tiny / "reference"}
    command = run(tiny, tmp_path, {**options, "micro_batch_tokens": 70}, PREFERENCES, HELD_OUT)
    with recorded(tmp_path):
        succeed("step2_reward.direct.main", command, tmp_path, ranks)
    check_budget([passes(tmp_path, rank) for rank in range(ranks)], 70)
    records = [[*map(compared, part)] for part in (PREFERENCES, HELD_OUT)]
    model, lines = train((tiny / "model", tiny / "reference"), *records, {**options, "loss": "dpo"})
    compare_metrics(tmp_path / "out", lines)
    compare_weights(tmp_path / "out/final", model)


@pytest.mark.parametrize(("ranks", "budget"), [(1, 0), (2, 0), (1, 45), (2, 45)])
def test_kto(tiny: Path, tmp_path: Path, ranks: int, budget: int) -> None:
    """The reference point is over responses to other prompts, which the run chooses. budget: in tokens."""
    options = {**OPTIONS, "loss": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    options["micro_batch_tokens"] = budget
    options["reference_model_name_or_path"] = tiny / "reference"
    with recorded(tmp_path):
        command = run(tiny, tmp_path, options, LABELLED, LABELLED_HELD_OUT)
        succeed("step2_reward.direct.main", command, tmp_path, ranks)
    if budget:
        check_budget([passes(tmp_path, rank) for rank in range(ranks)], budget)
    parts = []
    for records in (LABELLED, LABELLED_HELD_OUT):
        chosen = dict(unrelated(tmp_path, ranks, records))
        parts.append([
            Labelled(answer(r["prompt"], r["completion"]), r["label"], Answer(chosen[n], len(r["prompt"])))
            for n, r in enumerate(records)
        ])  # fmt: skip
        others = [tuple(record.unrelated.ids[record.unrelated.start :]) for record in parts[-1]]
        assert sorted(others) == sorted(tuple(r.answer.ids[r.answer.start :]) for r in parts[-1])
    model, lines = train_kto((tiny / "model", tiny / "reference"), *parts, options)
    compare_metrics(tmp_path / "out", lines)
    compare_weights(tmp_path / "out/final", model)


def test_resumed_shift(tiny: Path, tmp_path: Path) -> None:
    """Two steps, then two more: BCO's running mean stays."""
    options = {**OPTIONS, **LOSSES["shift"], "reference_model_name_or_path": tiny / "reference"}
    options |= {"lr_scheduler_type": "constant", "save_steps": 2, "max_steps": 4}
    for steps in (2, 4):
        command = run(tiny, tmp_path, {**options, "max_steps": steps}, PREFERENCES, HELD_OUT)
        succeed("step2_reward.direct.main", command, tmp_path)
    records = [[*map(compared, part)] for part in (PREFERENCES, HELD_OUT)]
    model, lines = train((tiny / "model", tiny / "reference"), *records, options)
    expected = [line["reward/shift"] for line in lines if "reward/shift" in line]
    assert len({*expected}) == 4
    logged_shifts = [line["reward/shift"] for line in logged(tmp_path / "out") if "reward/shift" in line]
    assert logged_shifts == pytest.approx(expected, rel=1e-5, abs=1e-6)
    compare_weights(tmp_path / "out/final", model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_apo_zero_of_single_responses(tiny: Path, tmp_path: Path, ranks: int) -> None:
    options = {**OPTIONS, "loss": "apo_zero_unpaired", "beta": 0.3, "desirable_weight": 1.3}
    options["reference_model_name_or_path"] = tiny / "reference"
    command = run(tiny, tmp_path, options, LABELLED, LABELLED_HELD_OUT)
    succeed("step2_reward.direct.main", command, tmp_path, ranks)
    parts = [
        [Labelled(answer(r["prompt"], r["completion"]), r["label"], None) for r in records]
        for records in (LABELLED, LABELLED_HELD_OUT)
    ]
    paths = tiny / "model", tiny / "reference"
    model, lines = train_kto(paths, *parts, {**options, "undesirable_weight": 1.0})
    compare_metrics(tmp_path / "out", lines)
    compare_weights(tmp_path / "out/final", model)


def unrelated(folder: Path, ranks: int, records: list[dict]) -> Iterator[tuple[int, list[int]]]:
    """For each record by number, its prompt with a response to another prompt, as the run has read it."""
    own = [answer(record["prompt"], record["completion"]).ids for record in records]
    prompts = [ids_of(record["prompt"]) for record in records]
    for one in (one for rank in range(ranks) for one in passes(folder, rank)):
        for row in one.input_ids:
            for number, prompt in enumerate(prompts):
                ids = without_padding(row, len(prompt), len(row))
                if row[: len(prompt)] == prompt and ids != own[number]:
                    assert any(
                        ids[len(prompt) :] == text[len(p) :] for text, p in zip(own, prompts, strict=True)
                    )
                    yield number, ids

"""Step 2, direct losses, against plain PyTorch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import succeed
from tests.recomputed.passes import check_budget, passes, recorded, without_padding
from tests.recomputed.plain_direct import WITHOUT_REFERENCE, Answer, Compared, Labelled, train, train_kto
from tests.recomputed.tiny import EOS, compare_metrics, compare_weights, ids_of, words, write_records

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
}


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


def run(tiny: Path, folder: Path, options: dict[str, Any], train_data: list, eval_data: list) -> list[str]:
    """The command line of a run on these records."""
    paths = {
        "train_data": write_records(folder / "train.jsonl", train_data),
        "eval_data": write_records(folder / "eval.jsonl", eval_data),
        "model_name_or_path": tiny / "model", "output_dir": folder / "out",
    }  # fmt: skip
    return words({**options, **paths})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_direct_loss(tiny: Path, tmp_path: Path, loss: str, ranks: int) -> None:
    """Pairs, ranked responses and ties of uneven length."""
    options = {**OPTIONS, **LOSSES[loss], "loss": loss}
    if loss not in WITHOUT_REFERENCE:
        options["reference_model_name_or_path"] = tiny / "reference"
    command = run(tiny, tmp_path, options, PREFERENCES, HELD_OUT)
    succeed("step2_reward.direct.main", command, tmp_path, ranks)
    model, lines = train(
        (tiny / "model", tiny / "reference"),
        [*map(compared, PREFERENCES)],
        [*map(compared, HELD_OUT)],
        options,
    )
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

"""Step 1 against plain PyTorch."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import succeed
from tests.recomputed.passes import check_budget, passes, recorded
from tests.recomputed.plain import rate_factor
from tests.recomputed.plain_sft import Text, train
from tests.recomputed.tiny import EOS, compare_metrics, compare_weights, ids_of, words, write_records

DEMONSTRATIONS = [
    ("abc ", "de"), ("b", "aaaaaab"), ("jig ", "a"), ("hhhhhhhhhh ", "ijijij"), ("ad a ", "bad bed"),
    ("acid ", "b"), ("fab fig ", "hi hide"), ("cab ", "ice"), ("c ", "jade gig did"), ("e", "fe fe fe"),
    ("a big badge if bad hid a bee edge ", "cage"), ("gaff ", "ah"),
]  # fmt: skip
HELD_OUT = [("abba ", "dad"), ("egg ", "fed a high bid"), ("if ", "i"), ("jab ", "c c c c")]
LONGEST = 24
OPTIONS = {
    "max_steps": 3, "global_batch_size": 12, "micro_batch_size": 2, "learning_rate": 0.01,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.4, "weight_decay": 0.3, "adam_beta1": 0.8,
    "adam_beta2": 0.9, "adam_epsilon": 0.01, "max_grad_norm": 1.0, "max_length": LONGEST,
    "logging_steps": 1, "eval_steps": 0, "save_steps": 0, "num_samples": 0,
}  # fmt: skip


def tokens(records: list[tuple[str, str]]) -> list[Text]:
    """Prompt and response as they are, and EOS; a long prompt loses its beginning."""
    rows = [(ids_of(prompt), [*ids_of(completion), EOS]) for prompt, completion in records]
    rows = [(prompt[max(0, len(prompt) + len(response) - LONGEST) :], response) for prompt, response in rows]
    return [Text(prompt + response, len(prompt)) for prompt, response in rows]


def command(tiny: Path, folder: Path, **changes: Any) -> list[str]:
    """The command line of a run."""
    files = {
        name: write_records(folder / f"{name}.jsonl", [{"prompt": p, "completion": c} for p, c in records])
        for name, records in (("train_data", DEMONSTRATIONS), ("eval_data", HELD_OUT))
    }
    paths = {"model_name_or_path": tiny / "model", "output_dir": folder / "out"}
    return words({**OPTIONS, **files, **paths, **changes})


def compare(tiny: Path, output: Path, factors: list[float], evaluations: set[int], **changes: Any) -> None:
    """Compare a run with shares of the peak learning rate, one per step."""
    rates = [OPTIONS["learning_rate"] * factor for factor in factors]
    texts = tokens(DEMONSTRATIONS), tokens(HELD_OUT)
    model, lines = train(tiny / "model", *texts, {**OPTIONS, **changes}, rates, evaluations)
    compare_metrics(output, lines)
    compare_weights(output / "final", model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sft(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """Every step is one epoch of demonstrations of uneven length, one of them too long."""
    succeed("step1_sft.main", command(tiny, tmp_path), tmp_path, ranks)
    factors = [rate_factor("cosine", step, 3, warmup=1) for step in range(3)]
    compare(tiny, tmp_path / "out", factors, {3})


@pytest.mark.parametrize("ranks", [1, 2])
def test_dft(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """The loss weighs tokens by their probability; the held-out loss does not."""
    succeed("step1_sft.main", command(tiny, tmp_path, token_loss="dft"), tmp_path, ranks)
    factors = [rate_factor("cosine", step, 3, warmup=1) for step in range(3)]
    compare(tiny, tmp_path / "out", factors, {3}, token_loss="dft")


@pytest.mark.parametrize("ranks", [1, 2])
def test_sft_by_tokens(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """Micro-batches of up to 60 tokens: an odd number of them, but as many on both ranks."""
    with recorded(tmp_path):
        words = command(tiny, tmp_path, micro_batch_tokens=60)
        succeed("step1_sft.main", words, tmp_path, ranks)
    of_ranks = [passes(tmp_path, rank) for rank in range(ranks)]
    check_budget(of_ranks, 60)
    positions = sum(one.positions for of_rank in of_ranks for one in of_rank if one.has_gradient)
    texts = tokens(DEMONSTRATIONS)
    padding = 1 - OPTIONS["max_steps"] * sum(len(text.ids) for text in texts) / positions
    rates = [OPTIONS["learning_rate"] * rate_factor("cosine", step, 3, warmup=1) for step in range(3)]
    model, lines = train(tiny / "model", texts, tokens(HELD_OUT), OPTIONS, rates, {3})
    lines = [{**line, "train/padding_share": padding} if "train/loss" in line else line for line in lines]
    compare_metrics(tmp_path / "out", lines)
    compare_weights(tmp_path / "out/final", model)


def test_resumed_sft(tiny: Path, tmp_path: Path) -> None:
    """One step, then two more: moments of AdamW stay, and the schedule becomes that of three steps."""
    schedule = {"lr_scheduler_type": "linear", "warmup_ratio": 0, "save_steps": 1}
    for steps in (1, 3):
        words = command(tiny, tmp_path, **schedule, max_steps=steps)
        succeed("step1_sft.main", words, tmp_path)
    factors = [1.0, rate_factor("linear", 1, 3), rate_factor("linear", 2, 3)]
    compare(tiny, tmp_path / "out", factors, {1, 3})

"""Step 2, the process reward model, against plain PyTorch."""

import json
from pathlib import Path

import pytest
from torch import nn

from tests.ranks import succeed
from tests.recomputed.passes import check_budget, passes, recorded
from tests.recomputed.plain import merged
from tests.recomputed.plain_process import Labelled, train
from tests.recomputed.tiny import (
    EOS,
    compare_adapted,
    compare_metrics,
    compare_weights,
    ids_of,
    words,
    write_records,
)

RECORDS = [
    {"prompt": "abc", "steps": ["de", "f", "gggg"], "labels": [1, 0, 0]},
    {"prompt": "b ", "steps": ["aaaaaab"], "labels": [1]},
    {"prompt": "hhhhhhhhhh", "steps": ["ij", "ha", "ha", "jijijiji"], "labels": [1, 1, None, 0.75]},
    {"prompt": "ad a ", "steps": ["bad ", "bed "], "labels": [None, 0]},
    {"prompt": "fab", "steps": ["hi", "hide"], "labels": [True, False]},
    {"prompt": "cab ", "completions": ["ice", "c", "ababab"], "labels": [True, True, True]},
    {"prompt": "c", "steps": ["jade", "gig", "did"], "labels": [0.25, None, 1]},
    {"prompt": "a big badge ", "steps": ["cage"], "labels": [0]},
]
HELD_OUT = [
    {"prompt": "abba", "steps": ["dad", "did"], "labels": [1, 0]},
    {"prompt": "egg", "steps": ["fed", "a", "high", "bid"], "labels": [1, 1, 1, 1]},
    {"prompt": "if", "steps": ["ijij", "i"], "labels": [0, None]},
]
OPTIONS = {
    "max_steps": 3, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.02,
    "lr_scheduler_type": "linear", "warmup_ratio": 0, "weight_decay": 0.2, "adam_epsilon": 0.01,
    "max_grad_norm": 0.5, "seed": 3, "lora_rank": 0, "lora_alpha": 6, "step_separator": " ",
    "logging_steps": 1, "eval_steps": 0, "save_steps": 0,
}  # fmt: skip


def tokens(record: dict) -> Labelled:
    ids, ends = ids_of(record["prompt"]), []
    for step in record.get("steps") or record["completions"]:
        ids += ids_of(step.strip() + " ")
        ends.append(len(ids) - 1)
    return Labelled([*ids[:-1], EOS], ends, record["labels"])


@pytest.mark.parametrize(("ranks", "budget"), [(1, 0), (2, 0), (2, 80)])
def test_process_model(tiny: Path, tmp_path: Path, ranks: int, budget: int) -> None:
    """Right, wrong, soft and absent labels; in micro-batches of records, and of up to 80 tokens."""
    with recorded(tmp_path):
        model = compare(tiny, tmp_path, ranks, OPTIONS, budget)
    compare_weights(tmp_path / "out/final", model)
    if budget:
        of_ranks = [[one for one in passes(tmp_path, rank) if one.has_gradient] for rank in range(ranks)]
        check_budget(of_ranks, budget)


def test_adapted_process_model(tiny: Path, tmp_path: Path) -> None:
    """With LoRA, final/ is merged; it is marked as a process model too."""
    options = {**OPTIONS, "lora_rank": 2}
    model = compare(tiny, tmp_path, 1, options)
    compare_adapted(tmp_path / "out/final", merged(model, options["lora_rank"], options["lora_alpha"]))


def compare(tiny: Path, folder: Path, ranks: int, options: dict, budget: int = 0) -> nn.Module:
    """Run both, and compare all but the weights; returns the plain model. budget: tokens of a micro-batch."""
    paths = {
        "train_data": write_records(folder / "train.jsonl", RECORDS),
        "eval_data": write_records(folder / "eval.jsonl", HELD_OUT),
        "model_name_or_path": tiny / "model", "output_dir": folder / "out",
    }  # fmt: skip
    module = "step2_reward.process.main"
    succeed(module, words({**options, **paths, "micro_batch_tokens": budget}), folder, ranks)
    model, lines = train(tiny / "model", [*map(tokens, RECORDS)], [*map(tokens, HELD_OUT)], options)
    compare_metrics(folder / "out", lines)
    config = json.loads((folder / "out/final/config.json").read_text())
    marks = config["step_separator"], config["reward_mean"], config["reward_std"]
    assert marks == (" ", 0.0, 1.0)
    return model

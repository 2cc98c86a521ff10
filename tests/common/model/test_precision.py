"""Sums of gradients in fp32 where 16 bits would lose the small ones; ranks of unlike precision."""

import json
import os
from dataclasses import replace
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

import step1_sft.main
from common.model.engine import backward_and_step, make_engine
from common.model.precision import needs_fp32_sums
from common.model.zero import load_zero_config
from common.runtime.distributed import init_distributed
from common.runtime.options import TrainOptions
from tests.ranks import FORK, run_stage
from tests.stages import ZERO, sft

OPTIONS = TrainOptions(global_batch_size=64, micro_batch_size=1, warmup_ratio=0.0)
SMALL = 2**-9  # 1 + SMALL is 1 in bf16, which has 8 binary digits


class Weights(nn.Module):
    """Their gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.ones(4)), PretrainedConfig(hidden_size=4)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.weight * inputs).sum()


def norm_of_sum(zero: dict, micro_batches: int) -> float:
    """The gradient norm of a step whose gradients are 1, SMALL, SMALL, ... in four weights."""
    options = replace(OPTIONS, global_batch_size=micro_batches)
    Path("zero.json").write_text(json.dumps(zero))
    config = load_zero_config("zero.json", options, learning_rate=1e-3)
    engine = make_engine(Weights(), config, options, 1e-3, total_steps=1)
    for number in range(1, micro_batches + 1):
        inputs = torch.full((4,), 1.0 if number == 1 else SMALL, dtype=torch.bfloat16)
        norm = backward_and_step(engine, engine(inputs), ranks=1, is_last=number == micro_batches)
    return norm


def _rank(folder: Path, news: Queue) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.chdir(folder)
    init_distributed()
    norms = {}
    for stage in (2, 3):
        zero = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
        own = {**zero, "data_types": {"grad_accum_dtype": "bf16"}}
        norms[stage] = [norm_of_sum(zero, 64), norm_of_sum(zero, 31), norm_of_sum(own, 64)]
    news.put(norms)


@pytest.mark.end_to_end
def test_gradients_of_many_micro_batches_are_summed_in_fp32(tmp_path: Path) -> None:
    """By DeepSpeed in bf16; a JSON with a dtype of its own has the last word."""
    news = FORK.Queue()
    child = FORK.Process(target=_rank, args=(tmp_path, news), daemon=True)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert news.get() == {stage: [2 * (1 + 63 * SMALL), 2.0, 2.0] for stage in (2, 3)}


@pytest.mark.parametrize(
    ("stage", "offload", "options", "expected"),
    [
        (2, False, {}, True),
        (3, True, {}, True),
        (2, False, {"micro_batch_size": 2}, True),  # 32 micro-batches
        (2, False, {"micro_batch_size": 3}, True),  # rows of 2, which divide 64
        (2, False, {"micro_batch_size": 4}, False),
        (2, False, {"micro_batch_tokens": 100}, False),
        (2, True, {}, False),
        (1, False, {}, False),
        (0, False, {}, False),
    ],
)
def test_where_sums_need_fp32(
    monkeypatch: pytest.MonkeyPatch, stage: int, offload: bool, options: dict, expected: bool
) -> None:
    zero = {
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu" if offload else "none"}}
    }
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert needs_fp32_sums(zero, replace(OPTIONS, **options)) is expected
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not needs_fp32_sums(zero, replace(OPTIONS, **options)), "16 micro-batches"


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_of_unlike_precision_are_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """As on GPUs of two kinds; at stage 3 before the ranks load a model together."""

    def load(*arguments: Any) -> dict:
        return load_zero_config(*arguments) | {"bf16": {"enabled": os.environ["RANK"] == "0"}}

    monkeypatch.setattr(step1_sft.main, "load_zero_config", load)
    words = [*sft(world, tmp_path / "out", steps=1), "--zero_config", str(ZERO / f"zero{stage}.json")]
    result = run_stage("step1_sft.main", words, tmp_path, ranks=2)
    assert result.codes == [2, 2]
    assert 'bf16 "auto", and only some GPUs of this run compute in bf16' in result.output

"""AdamW of bitsandbytes: the same steps as torch's, and refusals. Paging itself needs a GPU: `tests/gpu/`."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.model import deepspeed_check
from common.model.engine import backward_and_step, full_state_dict, make_engine
from common.model.engine_protocol import Engine
from common.model.zero import load_zero_config
from common.runtime.options import OptimiserOptions, UserError
from tests.conftest import assert_close
from tests.stages import ZERO

IDS = torch.arange(3, 19).view(2, 8)


def options(**changes: object) -> OptimiserOptions:
    sizes = {"global_batch_size": 2, "micro_batch_size": 2, "weight_decay": 0.3, "warmup_ratio": 0.0}
    return OptimiserOptions(**sizes | changes)


def make(stage: int, is_paged: bool) -> Engine:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes))
    chosen = options(paged_adamw=is_paged)
    zero = load_zero_config(str(ZERO / f"zero{stage}.json"), chosen, 1e-2)
    return make_engine(model, zero, chosen, 1e-2, 8)


def train(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        backward_and_step(engine, engine(IDS, labels=IDS).loss, 1, is_last=True)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="needs common/model/requirements-qlora.txt")
    monkeypatch.setattr(deepspeed_check, "on_cpu", lambda: False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_steps_are_those_of_torch(stage: int) -> None:
    ours, theirs = make(stage, True), make(stage, False)
    start = full_state_dict(theirs)
    for engine in (ours, theirs):
        train(engine, 4)
    weights, expected = full_state_dict(ours), full_state_dict(theirs)
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
        assert (weight - start[name]).abs().max() > 1e-3, name


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_checkpoint_continues_to_the_byte(tmp_path: Path, stage: int) -> None:
    engine = make(stage, True)
    train(engine, 2)
    engine.save_checkpoint(str(tmp_path), tag="step")
    train(engine, 2)
    expected = copy.deepcopy(full_state_dict(engine))
    again = make(stage, True)
    again.load_checkpoint(str(tmp_path), tag="step")
    train(again, 2)
    weights = full_state_dict(again)
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(UserError, match="^--paged_adamw: needs an NVIDIA GPU"):
        load_zero_config(str(ZERO / "zero2.json"), options(paged_adamw=True), 1e-2)


@pytest.mark.parametrize("name", ["zero3", "zero2_offload"])
def test_where_deepspeed_moves_the_moments_itself_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(deepspeed_check, "on_cpu", lambda: False)
    with pytest.raises(UserError, match="^--paged_adamw: allowed: ZeRO stage 0, 1 or 2 without"):
        load_zero_config(str(ZERO / f"{name}.json"), options(paged_adamw=True), 1e-2)

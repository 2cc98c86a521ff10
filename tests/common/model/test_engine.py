"""DeepSpeed engines."""

from pathlib import Path

import deepspeed
import pytest
import torch

import step1_sft.main
from common.model.engine import make_engine, make_frozen
from common.runtime.options import UserError
from tests.ranks import succeed
from tests.stages import sft


@pytest.mark.parametrize(("words", "passes"), [([], 1), (["--gradient_checkpointing"], 2)])
def test_gradient_checkpointing_is_active_in_the_first_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], passes: int
) -> None:  # fmt: skip
    """Models load in eval mode, and without held-out data no evaluation switches back to train mode."""

    def make(*parts):
        engine = make_engine(*parts)
        count = (tmp_path / "passes").open("ab", buffering=0)
        engine.module.model.layers[0].mlp.register_forward_pre_hook(lambda *_: count.write(b".") and None)
        return engine

    monkeypatch.setattr(step1_sft.main, "make_engine", make)
    options = [*sft(world, tmp_path / "out", steps=1), "--micro_batch_size", "8", "--eval_fraction", "0"]
    succeed("step1_sft.main", [*options, *words], tmp_path)
    assert (tmp_path / "passes").read_text() == "." * passes


@pytest.mark.parametrize(
    ("problem", "shown"), [(ValueError, UserError), (torch.OutOfMemoryError, torch.OutOfMemoryError)]
)
def test_full_memory_is_not_blamed_on_the_zero_config(
    monkeypatch: pytest.MonkeyPatch, problem: type[Exception], shown: type[Exception]
) -> None:
    def initialize(**_: object) -> None:
        raise problem("reason")

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    with pytest.raises(shown):
        make_frozen(torch.nn.Linear(1, 1), {})

"""DeepSpeed engines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

import step1_sft.main
from common.model.engine import make_engine, make_frozen
from common.runtime.options import UserError
from tests.ranks import succeed
from tests.stages import ZERO, ppo, sft, timeless


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
    ("stage", "precision", "ranks"), [(1, "bf16", 1), pytest.param(2, "fp32", 2, marks=pytest.mark.rare)]
)
def test_states_away_change_nothing(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str,
    ranks: int,
) -> None:  # fmt: skip
    """Weights, averages and metrics of a run without, of one with them, and of one stopped after step 2."""
    config = json.loads((ZERO / f"zero{stage}.json").read_text()) | {"bf16": {"enabled": precision == "bf16"}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    monkeypatch.setattr(DeepSpeedZeroOptimizer, "reload_states", counted(tmp_path / "reloads"))

    def train(name: str, steps: int, *words: str) -> None:
        options = ppo(world, run / "sft/final", run / "reward/final", tmp_path / name, steps)
        words = (
            "--zero_config",
            str(tmp_path / "zero.json"),
            "--ema_decay",
            "0.5",
            "--save_steps",
            "1",
            *words,
        )
        words = *words, "--lr_scheduler_type", "constant", "--eval_steps", "1"
        succeed("step3_ppo.main", [*options, *words], tmp_path, ranks)

    train("here", 3)
    assert not (tmp_path / "reloads").exists()
    train("away", 3, "--offload_states")
    assert (tmp_path / "reloads").read_text() == "." * ranks * 2 * (3 + 4)  # rollouts and evaluations
    for steps in (2, 3):
        train("resumed", steps, "--offload_states")
    for name in ("away", "resumed"):
        for folder in ("final", "final_critic", "final_ema"):
            files = [tmp_path / one / folder / "model.safetensors" for one in ("here", name)]
            assert files[0].read_bytes() == files[1].read_bytes(), f"{name}/{folder}"
    assert timeless(tmp_path / "here") == timeless(tmp_path / "away")


def counted(file: Path) -> Callable[..., None]:
    """DeepSpeed's `reload_states`, which appends to a file when it has something to move."""
    reload = DeepSpeedZeroOptimizer.reload_states

    def reload_states(optimizer: Any, *arguments: Any, **named: Any) -> None:
        if optimizer.offloaded_states == {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states}:
            with file.open("a") as text:
                text.write(".")
        reload(optimizer, *arguments, **named)

    return reload_states


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

"""Where the models of PPO are in memory."""

from pathlib import Path

import pytest
import torch

import step3_ppo.main
from common.model import engine
from common.model import reward_ensemble as ensemble
from step3_ppo.models import build_models
from tests.ranks import succeed
from tests.stages import (
    CLOSE,
    ZERO,
    metrics,
    ppo,
)

SHOWN = ["reward/mean", "kl/mean", "policy/loss", "value/loss", "eval/score"]


def has_checkpointing(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_offloaded_models_are_on_the_device_while_they_score(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """float64 stands for another device while models are built, as in common/model/test_ensemble.py. The run
    has the metrics of one without offload. Only the critic has gradient checkpointing.
    """

    def build(*words):
        with monkeypatch.context() as patch:
            for module in (engine, ensemble):
                patch.setattr(module, "device", lambda: torch.float64)
            models = build_models(*words)
            for ready in (models.reference_model, models.scorer.rewards[0].ready):
                with ready() as model:
                    tensors = [*model.parameters(), *model.buffers()]
                    assert {tensor.dtype for tensor in tensors} == {torch.float64}
                assert torch.float64 not in {tensor.dtype for tensor in tensors}
        assert has_checkpointing(models.critic) and not has_checkpointing(models.actor)
        return models

    monkeypatch.setattr(step3_ppo.main, "build_models", build)
    options = ppo(world, run / "sft/final", run / "reward/final", tmp_path / "out")
    options += ["--offload_frozen", "--critic_gradient_checkpointing"]
    succeed("step3_ppo.main", options, tmp_path)
    for name in SHOWN:
        assert metrics(tmp_path / "out", name) == metrics(run / "ppo", name)


def test_partitions_of_frozen_models_are_offloaded(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """At ZeRO-3, frozen models are offloaded; trained ones only if the JSON says so."""

    def build(*words):
        models = build_models(*words)
        with models.scorer.rewards[0].ready() as reward:
            engines = models.actor, models.reference, reward
            assert [engine.zero_offload_param() is None for engine in engines] == [True, False, False]
        return models

    monkeypatch.setattr(step3_ppo.main, "build_models", build)
    options = ppo(world, run / "sft/final", run / "reward/final", tmp_path / "out")
    options += ["--offload_frozen", "--zero_config", str(ZERO / "zero3.json")]
    succeed("step3_ppo.main", options, tmp_path, ranks=2)
    for name in SHOWN:
        assert metrics(tmp_path / "out", name) == pytest.approx(metrics(run / "ppo", name), **CLOSE)

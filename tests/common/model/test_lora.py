"""Warnings for learning rates of adapters."""

from dataclasses import replace

import pytest

from common.model.lora import check_adapters
from common.runtime.options import TrainOptions
from step3_ppo.options import PPOOptions


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (TrainOptions(), []),
        (TrainOptions(lora_rank=8), ["--learning_rate 1e-05"]),
        (TrainOptions(lora_rank=8, learning_rate=4e-5), ["--learning_rate 4e-05"]),
        (TrainOptions(lora_rank=8, learning_rate=1e-4), []),
        (PPOOptions(lora_rank=8), ["--actor_learning_rate", "--critic_learning_rate"]),
        (PPOOptions(lora_rank=8, advantage_estimator="rloo"), ["--actor_learning_rate"]),
        (PPOOptions(lora_rank=8, actor_learning_rate=3e-5, critic_learning_rate=1e-4), []),
    ],
)
def test_a_learning_rate_for_full_weights_gets_one_warning(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, options: TrainOptions, named: list[str]
) -> None:
    monkeypatch.setattr("common.model.lora.check_targets", lambda *_: None)  # needs a model
    check_adapters("", replace(options, lora_target_modules=["all-linear"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(named)
    for line, part in zip(lines, named, strict=True):
        assert part in line and "10 to 100 times" in line

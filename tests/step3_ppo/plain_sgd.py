"""A plain model in place of an engine, trained with plain SGD."""

from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from step3_ppo import optimise


def with_sgd(model: PreTrainedModel, rate: float, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The model, as `optimise` takes it."""
    model.num_tokens = model.config.vocab_size
    model.lr_scheduler = SimpleNamespace(step=lambda: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def backward_and_step(engine, loss, ranks, is_last):  # noqa: ARG001 - as the engine's
        loss.backward()
        if not is_last:
            return None
        optimizer.step()
        optimizer.zero_grad()
        return 1.0

    monkeypatch.setattr(optimise, "backward_and_step", backward_and_step)
    return model

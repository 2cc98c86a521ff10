"""A tiny policy and a tiny reward model, untrained."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from tests.bad_input.commands import MODULES


@pytest.fixture(scope="session")
def models(world: Path) -> Path:
    """`world` with a reward model in `reward_model`. Imports what the forks need, once."""
    for module in (*MODULES.values(), "datasets", "pyarrow.parquet"):
        importlib.import_module(module)
    folder = world / "reward_model"
    shutil.copytree(world / "model", folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return world

"""What the checks work with: models, records and launched runs, at the size of a GPU or tiny on the CPU."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from tests.stages import make_world

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
# Hidden size, MLP, layers, heads, vocabulary.
SHAPES = {"7B": (4096, 11008, 32, 32, 32_000), "1B": (2048, 5504, 24, 16, 32_000)}
TINY = (64, 160, 2, 2, 4096)


class Outcome(NamedTuple):
    """Result of a check."""

    passed: bool | None  # None: skipped
    figure: str
    speeds: dict[str, float] = {}  # of this machine, by the names of launch/plan


def skipped(reason: str) -> Outcome:
    return Outcome(None, reason)


@dataclass(frozen=True)
class Setting:
    """Device, and a folder for models and runs."""

    folder: Path
    is_cpu: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_cpu else "cuda")

    @property
    def world(self) -> Path:
        """A tiny policy in `model`, a reward model in `reward`, and the quickstart's data."""
        return self.folder / "world"

    def config(self, name: str, **changes: Any) -> LlamaConfig:
        """A Llama of a shape; tiny on the CPU."""
        hidden, mlp, layers, heads, vocabulary = TINY if self.is_cpu else SHAPES[name]
        sizes = {
            "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        }  # fmt: skip
        return LlamaConfig(**sizes | changes)

    def model(self, name: str, layers: int = 0) -> PreTrainedModel:
        """Random weights in bf16 on the device. layers: instead of those of the shape."""
        changes = {"num_hidden_layers": layers} if layers and not self.is_cpu else {}
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(self.config(name, **changes), dtype=torch.bfloat16).eval()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Time of some work, on a GPU until it has ended there."""
        self.synchronise()
        start = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - start

    def synchronise(self) -> None:
        if not self.is_cpu:
            torch.cuda.synchronize()


def prepare(setting: Setting) -> None:
    """Write the tiny models and their data."""
    model = make_world(setting.world) / "model"
    shutil.copytree(model, setting.world / "reward")
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(model, num_labels=1)).save_pretrained(
        setting.world / "reward"
    )


def write_policy(model: Path, folder: Path, **changes: Any) -> Path:
    """A random policy with the tokenizer and the configuration of another one, but for some changes."""
    shutil.copytree(model, folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(model, **changes)).save_pretrained(folder)
    return folder


def write_config(setting: Setting, name: str, base: str, **zero: Any) -> Path:
    """A shipped DeepSpeed JSON in fp32 with further settings of `zero_optimization`."""
    config = json.loads((ROOT / f"common/zero_configs/{base}.json").read_text())
    config["bf16"]["enabled"] = False
    config["zero_optimization"] |= zero
    path = setting.folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def start(script: str, words: list[Any], **variables: Any) -> subprocess.Popen:
    """Start a launch script, on one rank unless NUM_GPUS is among the variables."""
    environment = {**os.environ, "NUM_GPUS": "1"} | {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(["bash", str(ROOT / "launch" / script), *map(str, words)], env=environment)


def launch(script: str, words: list[Any], code: int = 0, **variables: Any) -> None:
    """Run a launch script that must end with this exit code."""
    ended_with = start(script, words, **variables).wait()
    if ended_with != code:
        raise RuntimeError(f"{script} ended with exit code {ended_with} instead of {code}")

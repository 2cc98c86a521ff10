"""Predictions of `launch/plan.sh` beside what PyTorch's MemTracker counts with fake tensors.

    python tests/bench/plan_memory.py               # every model and phase, as a table
    python tests/bench/plan_memory.py 7B 13B        # some models
    python tests/bench/plan_memory.py --layers 4    # of each model

Fake tensors have shapes and no memory, so that a model of any size runs on any machine. Counted is one rank
in bf16: weights, gradients, activations, logits, masks and caches. The suite's own code runs the passes;
DeepSpeed does not run with fake tensors. Attention on the CPU saves what flash attention saves.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
from transformers.cache_utils import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.generation.cache import InPlaceCache
from common.generation.decoding import draw
from common.model.forward import label_pass, token_scores
from common.model.head import Targets
from common.model.loading import ScalarHead
from launch.plan.activations import Mask, last_states, passing
from launch.plan.logits import logits_in_scoring
from launch.plan.memory import Model, Zero, total, weights
from launch.plan.phases import passed, training
from launch.plan.sampling import SampleBatch, sampling
from launch.plan.shapes import read_shape

GIB = 2**30
# Hidden size, MLP, layers, heads, key-value heads, vocabulary: of Llama 3.2, 2, 3, 2, CodeLlama, Llama 2.
MODELS = {
    "1B": (2048, 8192, 16, 32, 8, 128_256), "7B": (4096, 11008, 32, 32, 32, 32_000),
    "8B": (4096, 14336, 32, 32, 8, 128_256), "13B": (5120, 13824, 40, 40, 40, 32_000),
    "34B": (8192, 22016, 48, 64, 8, 32_000), "70B": (8192, 28672, 80, 64, 8, 32_000),
}  # fmt: skip
ROWS, PROMPT, RESPONSE = 4, 512, 512
WIDTH = PROMPT + RESPONSE


class Case(NamedTuple):
    """A phase: what runs on a model, and what the plan predicts."""

    run: Callable[[Any], None]
    predict: Callable[[Model], float]
    is_scalar: bool = False
    checkpointing: bool = False


def positions(rows: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of all states in some columns."""
    columns = torch.arange(first, last).repeat(rows)
    return torch.arange(rows).repeat_interleave(last - first), columns


def ids(rows: int = ROWS, width: int = WIDTH) -> Tensor:
    return torch.zeros(rows, width, dtype=torch.long)


def train_policy(model: Any, mask: Mask = "none") -> None:
    """A micro-batch of step 3: the labels are those of the responses."""
    targets = Targets(torch.zeros(ROWS * RESPONSE, dtype=torch.long), temperature=0.9, entropy="value")
    dtypes = {"packed": torch.bool, "shared": torch.bfloat16}
    layout = None if mask == "none" else torch.zeros(ROWS, 1, WIDTH, WIDTH, dtype=dtypes[mask])
    states = positions(ROWS, PROMPT - 1, WIDTH - 1)
    label_pass(model, ids(), states, targets, attention_mask=layout).logprobs.sum().backward()


def train_critic(model: Any) -> None:
    token_scores(model, ids(), positions(ROWS, PROMPT - 1, WIDTH - 1)).sum().backward()


@torch.no_grad()
def score(model: Any) -> None:
    """A batch of reference log-probabilities."""
    targets = Targets(torch.zeros(ROWS * RESPONSE, dtype=torch.long), temperature=0.9)
    label_pass(model, ids(), positions(ROWS, PROMPT - 1, WIDTH - 1), targets)


@torch.no_grad()
def sample(model: Any) -> None:
    """The prompts, and the last step of the responses."""
    cache = InPlaceCache(DynamicCache(config=model.config), ROWS, (ROWS, WIDTH - 1))
    prompts = cache.group(slice(0, ROWS), 0, torch.arange(ROWS))
    outputs = model(ids(width=PROMPT), past_key_values=prompts, use_cache=True, logits_to_keep=1)
    joined = cache.join()
    for layer in joined.layers:
        layer.length = WIDTH - 2
    where = torch.full((ROWS, 1), WIDTH - 2)
    outputs = model(ids(width=1), past_key_values=joined, use_cache=True, position_ids=where)
    draw(outputs.logits[:, -1], torch.zeros(ROWS), temperature=0.9, top_p=1.0, top_k=0)


def peak_of_training(model: Model, checkpointing: bool, count: int, mask: Mask = "none") -> float:
    forward = passed(model, ROWS, WIDTH, checkpointing, count, mask)
    return max(total(phase.parts) for phase in training(model, weights(model), forward, accumulates=False))


def peak_of_scoring(model: Model) -> float:
    logits = logits_in_scoring(model, ROWS * RESPONSE) + last_states(model, ROWS, WIDTH)
    return total(weights(model)) + max(logits, passing(model, ROWS, WIDTH))


def peak_of_sampling(model: Model) -> float:
    return total(weights(model) + sampling(model, SampleBatch(ROWS, ROWS, PROMPT, RESPONSE)))


def case_of_training(checkpointing: bool, mask: Mask = "none") -> Case:
    predict = functools.partial(
        peak_of_training, checkpointing=checkpointing, count=ROWS * RESPONSE, mask=mask
    )
    return Case(functools.partial(train_policy, mask=mask), predict, checkpointing=checkpointing)


CASES = {
    "sampling": Case(sample, peak_of_sampling),
    "scoring": Case(score, peak_of_scoring),
    "actor": case_of_training(False),
    "actor, checkpointing": case_of_training(True),
    "packed rows": case_of_training(False, "packed"),
    "shared prompts": case_of_training(False, "shared"),
    "critic": Case(train_critic, functools.partial(peak_of_training, checkpointing=False, count=0), True),
}


def config_of(name: str, layers: int = 0) -> LlamaConfig:
    hidden, mlp, depth, heads, key_heads, vocabulary = MODELS[name]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=vocabulary, num_labels=1,
        max_position_embeddings=4096, pad_token_id=0, tie_word_embeddings=name == "1B",
    )  # fmt: skip


class PeakTracker(MemTracker):
    """Tracks the peak alone, not that of each module, which takes most of the time and allows one pass."""

    def _pre_fw_hook(self, *_: Any) -> None: ...
    def _post_fw_hook(self, *_: Any) -> None: ...
    def _pre_bw_hook(self, *_: Any) -> None: ...
    def _post_bw_hook(self, *_: Any) -> None: ...


def track(config: LlamaConfig, case: Case) -> float:
    """Bytes at the peak."""
    kind = AutoModelForSequenceClassification if case.is_scalar else AutoModelForCausalLM
    with FakeTensorMode():
        model = kind.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
        model.has_own_logits = False  # fake logits cannot be compared
        if case.is_scalar:
            model.score.__class__ = ScalarHead
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tracker = PeakTracker()
        tracker.track_external(model)
        with tracker:
            case.run(model)
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"]


def plan(config: LlamaConfig, case: Case) -> float:
    """Bytes at the peak, as the plan counts them."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        shape = read_shape(folder, case.is_scalar, 0, ())
    return case.predict(Model(shape, Zero(stage=0, ranks=1, size=2)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=[*MODELS])
    parser.add_argument("--layers", type=int, default=0, help="0: all")
    args = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    print("| model | phase | predicted, GiB | tracked, GiB | ratio |\n|---|---|---|---|---|")
    for name in args.models:
        for phase, case in CASES.items():
            config = config_of(name, args.layers)
            planned, tracked = plan(config, case) / GIB, track(config, case) / GIB
            print(
                f"| {name} | {phase} | {planned:.2f} | {tracked:.2f} | {planned / tracked:.3f} |", flush=True
            )


if __name__ == "__main__":
    main()

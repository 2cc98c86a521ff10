"""Load models at any ZeRO stage: causal language models, and scalar models (reward models and critics)."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from common.model.deepspeed_internals import is_partitioned, share_node_groups
from common.model.families import check_policy, check_scalar, max_positions, remove_noise
from common.model.model_config import read_config
from common.model.model_files import check_attention, check_values, check_weights, read_weights
from common.model.precision import check_same_precision
from common.model.vocabulary import fit_to_tokenizer
from common.model.zero import fill_bucket_sizes
from common.runtime.distributed import log

# No progress bars of transformers, and no warning about the scalar head, which is new on purpose.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

Options = TypeVar("Options")


class ScalarHead(nn.Linear):
    """A linear head that always computes in fp32: bf16 scores have only three digits."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float())


def load_config(path: str) -> PretrainedConfig:
    """Load the configuration, with dropout and router jitter off: they add noise to ratios and scores.

    Raises UserError, naming the path, unless it is a model folder or an available hub name.
    """
    config = read_config(path)
    remove_noise(config)
    return config


def fit_to_model(options: Options, *configs: PretrainedConfig) -> Options:
    """A copy of the options whose --max_length is within the context length of all models.

    A reduction is a line in the log.
    """
    for config in configs:
        limit = max_positions(config)
        if options.max_length > limit:
            log(f"--max_length {options.max_length} exceeds the model's context length; using {limit}")
            options = dataclasses.replace(options, max_length=limit)
    return options


def plain_config(is_bf16: bool, kernels: str) -> dict[str, Any]:
    """The configuration of models without a DeepSpeed JSON. kernels: --attn_implementation.

    Raises UserError for kernels that this machine lacks.
    """
    check_attention(kernels)
    return {"bf16": {"enabled": is_bf16}, "zero_optimization": {"stage": 0}, "attn_implementation": kernels}


def load_causal_lm(
    path: str, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any] | None
) -> PreTrainedModel:
    """Load a causal language model, and grow its vocabulary to the tokenizer's.

    zero: DeepSpeed configuration of the engine for this model. It sets precision and attention kernels and,
    at stage 3, partitions the weights while they load. None: a plain module in fp32.
    """
    config = load_config(path)
    check_policy(config)
    return _load(AutoModelForCausalLM, path, config, zero, tokenizer)


def load_scalar_model(
    path: str, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any] | None, seed: int = 0
) -> PreTrainedModel:
    """Load a model with one scalar output per position, on the backbone at `path`.

    A reward model keeps its head. A language model gets a new one without bias, drawn from
    N(0, 1 / sqrt(d + 1)) with the seed (Stiennon et al. 2020, appendix B.1).
    """
    config = load_config(path)
    has_head = is_scalar(config)
    config.num_labels = 1
    check_scalar(config)
    model = _load(AutoModelForSequenceClassification, path, config, zero, tokenizer, new_head=not has_head)
    model.score.__class__ = ScalarHead
    if not has_head:
        initialise_head(model, std=(model.score.in_features + 1) ** -0.5, seed=seed)
    return model


def initialise_head(model: PreTrainedModel, std: float, seed: int = 0) -> None:
    """Initialise the scalar head from N(0, std), the same on every rank; with std 0 it is all zeros."""
    import deepspeed

    weight = model.score.weight
    with (
        torch.no_grad(),
        deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=is_partitioned(weight)),
    ):
        if weight.numel():  # partitioned weights are empty on other ranks
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * std)


def is_scalar(config: PretrainedConfig) -> bool:
    """Whether the configuration is that of a sequence classifier with one output."""
    architecture = (config.architectures or [""])[0]
    return architecture.endswith("ForSequenceClassification") and config.num_labels == 1


def _load(
    kind: Any, path: str, config: PretrainedConfig, zero: dict[str, Any] | None,
    tokenizer: PreTrainedTokenizerFast, new_head: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """Load a model. Raises UserError for weights that are missing or not finite."""
    check_weights(kind, path, new_head)
    with _partitioned(zero, config):
        model = read_weights(
            kind, path, config, _dtype(zero), (zero or {}).get("attn_implementation", "auto")
        )
        check_values(model, path)
        return fit_to_tokenizer(model, tokenizer)


def _dtype(zero: dict[str, Any] | None) -> torch.dtype:
    if zero and zero.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if zero and zero.get("fp16", {}).get("enabled") else torch.float32


@contextlib.contextmanager
def _partitioned(zero: dict[str, Any] | None, config: PretrainedConfig) -> Iterator[None]:
    """Context manager: transformers loads and resizes partitioned weights, if the JSON sets stage 3."""
    if not zero or zero["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    check_same_precision(zero)
    fill_bucket_sizes(zero, config.get_text_config().hidden_size)
    share_node_groups()
    keep_alive = HfDeepSpeedConfig(zero)  # transformers keeps only a weak reference
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()

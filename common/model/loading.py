"""Load models under every ZeRO stage, and read logits and scores at chosen positions only."""

import contextlib
from collections.abc import Iterator
from typing import Any

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

from common.model.families import check_policy, check_scalar, position_limit, remove_noise
from common.model.model_config import read_config
from common.model.model_files import check_values, check_weights, is_partitioned, read_weights
from common.model.vocabulary import fit_to_tokenizer
from common.model.zero import fill_bucket_sizes
from common.runtime.distributed import log

# Loading speaks through our own log: no bars, and no report of the scalar head that is new by intention.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


class ScalarHead(nn.Linear):
    """A linear head that computes in fp32 whatever its weights are: bf16 scores have three digits."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float())


def load_config(path: str) -> PretrainedConfig:
    """The model configuration without dropout or router jitter: in RLHF they only add noise to ratios and
    scores.

    Raises UserError, naming the path, when it is neither a model folder nor a hub name that can be had.
    """
    config = read_config(path)
    remove_noise(config)
    return config


def longest_input(config: PretrainedConfig, wanted: int, option: str) -> int:
    """`wanted` tokens, or as many as the model has positions for, saying so when that is fewer."""
    limit = position_limit(config) or wanted
    if wanted > limit:
        log(f"--{option} {wanted} is more than the model's {limit} positions: {limit} it is")
    return min(wanted, limit)


def load_causal_lm(
    path: str, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any] | None
) -> PreTrainedModel:
    """A causal language model whose vocabulary covers the tokenizer.

    zero: DeepSpeed configuration of the engine that will hold it, which decides precision and, at stage 3,
    partitions the weights while they load; None for a plain module in fp32.
    """
    config = load_config(path)
    check_policy(config)
    return fit_to_tokenizer(_load(AutoModelForCausalLM, path, config, zero), tokenizer)


def load_scalar_model(
    path: str, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any] | None, seed: int = 0
) -> PreTrainedModel:
    """A model with one scalar output per position, on the backbone found at `path`.

    From a reward model the head comes along. From a language model it is new: N(0, 1 / sqrt(d + 1)), without
    a bias (Stiennon et al. 2020, appendix B.1), drawn from the seed.
    """
    config = load_config(path)
    has_head = is_scalar(config)
    config.num_labels = 1
    check_scalar(config)
    model = _load(AutoModelForSequenceClassification, path, config, zero, new_head=not has_head)
    model.score.__class__ = ScalarHead
    if not has_head:
        initialise_head(model, std=(model.score.in_features + 1) ** -0.5, seed=seed)
    return fit_to_tokenizer(model, tokenizer)


def initialise_head(model: PreTrainedModel, std: float, seed: int = 0) -> None:
    """Draw the scalar head anew from N(0, std), the same on every rank; a std of 0 makes it zero."""
    import deepspeed

    weight = model.score.weight
    with (
        torch.no_grad(),
        deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=is_partitioned(weight)),
    ):
        if weight.numel():  # on the other ranks a partitioned weight is empty
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * std)


def is_scalar(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of a sequence classifier with one output."""
    architecture = (config.architectures or [""])[0]
    return architecture.endswith("ForSequenceClassification") and config.num_labels == 1


def _load(
    kind: Any, path: str, config: PretrainedConfig, zero: dict[str, Any] | None, new_head: bool = False
) -> PreTrainedModel:
    """The model with complete, finite weights. Raises UserError for others."""
    check_weights(kind, path, new_head)
    with _partitioned(zero, config):
        model = read_weights(kind, path, config, _dtype(zero))
    check_values(model, path)
    return model


def _dtype(zero: dict[str, Any] | None) -> torch.dtype:
    if zero and zero.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if zero and zero.get("fp16", {}).get("enabled") else torch.float32


@contextlib.contextmanager
def _partitioned(zero: dict[str, Any] | None, config: PretrainedConfig) -> Iterator[None]:
    """While open, transformers splits the weights it loads over the ranks, if the JSON is of stage 3."""
    if not zero or zero["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    fill_bucket_sizes(zero, config.get_text_config().hidden_size)
    keep_alive = HfDeepSpeedConfig(zero)  # transformers holds it by a weak reference only
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()

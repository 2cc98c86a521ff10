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

from common.balance import balance_loss, has_balance_loss
from common.distributed import log
from common.families import check_policy, check_scalar, position_limit, remove_noise
from common.model_config import read_config
from common.model_files import check_values, check_weights, is_partitioned, read_weights
from common.vocabulary import fit_to_tokenizer
from common.zero import fill_bucket_sizes

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


def response_logits(
    model: nn.Module, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Logits of the model at the chosen positions only: input_ids (B, T), positions (B, T) bool -> (N, V).

    position_ids (B, T): given when rows hold several documents, at each of which they begin again at 0; most
    models then confine attention to the document by themselves.

    Rows are padded on the right. No attention mask is passed: under causal attention a real token never sees
    what follows it, and without a mask attention takes its fastest path. The output head sees the N chosen
    hidden states, so that no logits are made for prompts and padding.
    """
    return logits_and_balance(model, input_ids, positions, position_ids)[0]


def logits_and_balance(
    model: nn.Module, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`response_logits`, and what a mixture of experts adds to the loss in training: see `balance_loss`; else
    0.
    """
    base = base_model(model)
    head = base.get_output_embeddings()
    choose = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][positions],))
    packed = {} if position_ids is None else {"position_ids": position_ids}
    try:
        outputs = model(input_ids=input_ids, use_cache=False, **packed)
    finally:
        choose.remove()
    if base.training and has_balance_loss(base):
        return outputs.logits, balance_loss(base, outputs, positions)
    return outputs.logits, torch.zeros((), device=input_ids.device)


def token_scores(model: nn.Module, input_ids: Tensor, positions: Tensor, **layout: Tensor) -> Tensor:
    """Scalar output at the chosen positions: input_ids (B, T) padded right, positions (B, T) bool -> (N,)
    fp32.

    The model's own forward would choose a position by the pad id; the head's output is read on its way out
    instead. The `reward_mean` and `reward_std` of the configuration, which step 2 writes, are applied.

    layout: for rows that are not one plain sequence each, `position_ids` (B, T) and an `attention_mask`
    (B, 1, T, T) that is added to the attention logits.
    """
    return token_scores_and_states(model, input_ids, positions, **layout)[0]


def token_scores_and_states(
    model: nn.Module, input_ids: Tensor, positions: Tensor, **layout: Tensor
) -> tuple[Tensor, Tensor]:
    """`token_scores`, and the last hidden states (B, T, hidden size), which the scalar head reads."""
    calls: list[tuple[Tensor, Tensor]] = []
    read = base_model(model).score.register_forward_hook(
        lambda _, inputs, output: calls.append((inputs[0], output))
    )
    try:
        model(input_ids=input_ids, use_cache=False, **layout)
    finally:
        read.remove()
    (states, outputs), config = calls[0], base_model(model).config
    scores = outputs[positions].squeeze(-1)  # (B, T, 1) -> (N,)
    centred = (scores - getattr(config, "reward_mean", 0.0)) / getattr(config, "reward_std", 1.0)
    return centred, states


def last_positions(lengths: Tensor, width: int) -> Tensor:
    """True at the last token of each row: lengths (B,) -> (B, width) bool."""
    return torch.arange(width, device=lengths.device) == (lengths - 1).unsqueeze(1)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a DeepSpeed engine or a peft wrapper."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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

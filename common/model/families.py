"""Model families: checks that a stage supports one, and quantities that families name differently.

Only the configuration is read; no weights are loaded.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from common.runtime.options import UserError, reason
from common.text.transformers_internals import keeps_states_in_cache

# Recurrent states are held by the modules, not by the cache, so a batch cannot be reduced to some rows.
STATES_IN_MODULES = ("recurrent_gemma",)
ROUTED_BY_NOISE = ("phimoe",)


def check_policy(config: PretrainedConfig) -> None:
    """Raise UserError unless the configuration is that of a causal language model."""
    if config.model_type in ROUTED_BY_NOISE:
        raise UserError(
            f"{config.name_or_path}: model type {config.model_type!r} is not supported: it selects experts"
            " at random in training, so sampling and training would differ"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not _is_causal(config):
        raise UserError(
            f"{config.name_or_path}: model type {config.model_type!r} is not a causal language model of"
            " transformers; a policy must be one, such as Llama, Qwen, Gemma or Mistral"
        )


def check_sampling(config: PretrainedConfig) -> None:
    """Raise UserError unless responses can be sampled from a model of this configuration."""
    check_policy(config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not keeps_states_in_cache(model_class) or config.model_type in STATES_IN_MODULES:
        raise UserError(
            f"{config.name_or_path}: cannot sample from model type {config.model_type!r}, whose states are"
            " not in a transformers cache; step1_sft.sh, step2_direct.sh, judge.sh and evaluate_sft.sh work"
        )


def check_scalar(config: PretrainedConfig) -> None:
    """Raise UserError unless transformers has this family with a scalar head, for reward models and critics.

    The class is a ...ForSequenceClassification with a linear `score` head, applied at every position.
    """
    model_type = config.model_type
    problem = f"transformers has no sequence classifier of model type {model_type!r}"
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        try:
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 - the configuration may hold anything
            raise UserError(f"{config.name_or_path}: cannot build a model from it: {reason(error)}") from None
        if _is_causal(config) and isinstance(getattr(model, "score", None), nn.Linear):
            return
        problem = f"{type(model).__name__} is not a causal model with a linear `score` head"
    raise UserError(
        f"{config.name_or_path}: {problem}, so it can be neither reward model nor critic; step 1,"
        " step2_direct.sh, and step 3 with --advantage_estimator rloo or group work without one"
    )


def _is_causal(config: PretrainedConfig) -> bool:
    """Whether attention is causal. Encoders such as BERT are causal only with `is_decoder`."""
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return not config.is_encoder_decoder and not is_encoder and not hasattr(config, "text_encoder")


def remove_noise(config: PretrainedConfig) -> None:
    """Set dropout and router jitter to 0, also in sub-configurations."""
    for name, value in config.to_dict().items():
        is_noise = "dropout" in name or "pdrop" in name or "jitter" in name or name == "layerdrop"
        if is_noise and isinstance(value, float):
            setattr(config, name, 0.0)
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            remove_noise(part)


def attention_widths(config: PretrainedConfig) -> list[int]:
    """Heads x head size of each attention layer; recurrent layers are left out."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["attention"] * getattr(text, "num_hidden_layers", 0)
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * len(kinds)
    widths = []
    for kind, layer in zip(kinds, layers, strict=True):
        heads = getattr(layer, "num_attention_heads", None)
        if heads and "attention" in kind and "linear" not in kind:
            widths.append(heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads))
    return widths


def head_size(config: PretrainedConfig) -> int:
    """Width of an attention head."""
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def active_share(config: PretrainedConfig) -> float:
    """Fraction of the experts that are active for a token; 1 for a dense model."""
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((count for name in names if (count := getattr(text, name, None))), None)
    names = ("num_experts_per_tok", "top_k_experts")
    chosen = next((chosen for name in names if (chosen := getattr(text, name, None))), count)
    return chosen / count if count else 1.0


def max_positions(config: PretrainedConfig) -> int:
    """Context length of the model in tokens; `sys.maxsize` without a limit."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    return next((limit for name in names if (limit := getattr(text, name, None))), sys.maxsize)


def adjust_logits(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """What models do to the output of their head, (..., V): a factor, then a soft cap."""
    text = config.get_text_config()
    if factor := _number(text, "logit_scale", "lm_head_multiplier"):
        logits = logits * factor
    if divisor := _number(text, "logits_scaling"):
        logits = logits / divisor
    if cap := _number(text, "final_logit_softcapping", "logits_soft_cap"):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _number(config: PretrainedConfig, *names: str) -> float:
    """The first of these attributes that is a number other than 0; without one, 0."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int | float) and value), 0.0)

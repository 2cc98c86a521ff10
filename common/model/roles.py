"""Which kind of model an option takes: a language model, or a reward model. Each check also looks whether the
files hold the weights that the model needs.
"""

import math
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from common.model.families import check_policy, check_scalar
from common.model.loading import is_scalar, load_config
from common.model.model_files import check_weights
from common.runtime.options import UserError

# Endings of architectures that do not predict the next token, whatever their weights look like.
OTHER_HEADS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
    "ForMaskedLM",
)  # fmt: skip


def policy_config(path: str, option: str) -> PretrainedConfig:
    """The configuration of a language model. Raises UserError, naming the option, for any other model."""
    config = load_config(path)
    if _architecture(config).endswith(OTHER_HEADS):
        raise UserError(
            f"--{option} {path}: not a language model but {_describe(config)}; give one with an output head"
            " for tokens, such as `final/` of step 1"
        )
    check_policy(config)
    check_weights(AutoModelForCausalLM, path)
    return config


def check_scalar_model(path: str, option: str) -> None:
    """Raise UserError, naming the option, unless this is a reward model as step 2 writes it."""
    config = load_config(path)
    if not is_scalar(config):
        raise UserError(
            f"--{option} {path}: not a reward model but {_describe(config)}; give `final/` of step 2, or"
            " another ...ForSequenceClassification with one output"
        )
    check_scalar(config)
    check_weights(AutoModelForSequenceClassification, path)
    _check_centre(path, config)


def backbone_config(path: str, option: str) -> PretrainedConfig:
    """The configuration of what a reward model is trained from: a language model, or a reward model, of which
    the head is trained on. Raises UserError, naming the option, for any other model.
    """
    config = load_config(path)
    if is_scalar(config):
        check_scalar_model(path, option)
    elif _architecture(config).endswith(OTHER_HEADS):
        raise UserError(
            f"--{option} {path}: {_describe(config)} cannot become a reward model; give a language model,"
            " such as `final/` of step 1, or a reward model with one output"
        )
    else:
        check_scalar(config)
        check_weights(AutoModelForSequenceClassification, path, new_head=True)
    return config


def _check_centre(path: str, config: PretrainedConfig) -> None:
    """Raise UserError when the scores cannot be centred and scaled as the configuration asks."""
    for name in ("reward_mean", "reward_std"):
        value = getattr(config, name, 1.0)
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or (name == "reward_std" and value <= 0):
            wanted = "above 0" if name == "reward_std" else "that is finite"
            raise UserError(
                f"{Path(path) / 'config.json'}: {name} is {value!r}; it must be a number {wanted}"
            )


def _architecture(config: PretrainedConfig) -> str:
    return (config.architectures or [""])[0]


def _describe(config: PretrainedConfig) -> str:
    name = _architecture(config) or "a model without `architectures` in its config.json"
    if name.endswith("ForSequenceClassification"):
        return f"{name} with {config.num_labels} output{'s' * (config.num_labels != 1)}"
    return name

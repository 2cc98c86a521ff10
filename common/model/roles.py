"""Check that a path holds the kind of model that its option needs, with all weights."""

import math
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from common.model.families import check_policy, check_scalar
from common.model.loading import is_scalar, load_config
from common.model.model_files import check_weights
from common.runtime.options import UserError

# Suffixes of architectures that do not predict the next token.
OTHER_HEADS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
    "ForMaskedLM",
)  # fmt: skip


def policy_config(path: str, option: str) -> PretrainedConfig:
    """Read the configuration of a language model. Raises UserError, naming the option, for other models."""
    config = load_config(path)
    if _architecture(config).endswith(OTHER_HEADS):
        raise UserError(
            f"--{option} {path}: not a language model ({_model_class(config)}); use one with an output head"
            " for tokens, such as `final/` of step 1"
        )
    check_policy(config)
    check_weights(AutoModelForCausalLM, path)
    return config


def check_scalar_model(path: str, option: str) -> None:
    """Raise UserError, naming the option, unless the path holds a reward model like `final/` of step 2."""
    config = _scalar_config(path, option)
    if _scores_steps(config):
        raise UserError(
            f"--{option} {path}: a process reward model, which scores steps; use a reward model of whole"
            " responses here, and this one as --process_model_name_or_path of step 3 or best of n"
        )


def check_process_model(path: str, option: str) -> PretrainedConfig:
    """Read the configuration of a process reward model like `final/` of step2_process.sh.

    Raises UserError, naming the option, for any other model.
    """
    config = _scalar_config(path, option)
    if not _scores_steps(config):
        raise UserError(
            f"--{option} {path}: a reward model of whole responses (no `step_separator` in its config.json);"
            " use `final/` of step2_process.sh"
        )
    if not isinstance(config.step_separator, str) or not config.step_separator:
        raise UserError(
            f"{Path(path) / 'config.json'}: step_separator is {config.step_separator!r}; it must be text"
        )
    return config


def _scores_steps(config: PretrainedConfig) -> bool:
    return hasattr(config, "step_separator")


def _scalar_config(path: str, option: str) -> PretrainedConfig:
    config = load_config(path)
    if not is_scalar(config):
        raise UserError(
            f"--{option} {path}: not a reward model ({_model_class(config)}); use `final/` of step 2, or"
            " another ...ForSequenceClassification with one output"
        )
    check_scalar(config)
    check_weights(AutoModelForSequenceClassification, path)
    _check_centre(path, config)
    return config


def backbone_config(path: str, option: str, scores_steps: bool = False) -> PretrainedConfig:
    """Read the configuration of the model from which a reward model is trained.

    A language model gets a new head; a reward model keeps its head. scores_steps: a process reward model is
    trained, which may start from either kind of reward model. Raises UserError, naming the option, for any
    other model.
    """
    config = load_config(path)
    if is_scalar(config):
        (_scalar_config if scores_steps else check_scalar_model)(path, option)
    elif _architecture(config).endswith(OTHER_HEADS):
        raise UserError(
            f"--{option} {path}: cannot train a reward model from it ({_model_class(config)}); use a language"
            " model, such as `final/` of step 1, or a reward model with one output"
        )
    else:
        check_scalar(config)
        check_weights(AutoModelForSequenceClassification, path, new_head=True)
    return config


def _check_centre(path: str, config: PretrainedConfig) -> None:
    """Raise UserError for a `reward_mean` or `reward_std` that cannot centre and scale scores."""
    for name in ("reward_mean", "reward_std"):
        value = getattr(config, name, 1.0)
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or (name == "reward_std" and value <= 0):
            allowed = "a number above 0" if name == "reward_std" else "a finite number"
            raise UserError(f"{Path(path) / 'config.json'}: {name} is {value!r}; it must be {allowed}")


def _architecture(config: PretrainedConfig) -> str:
    return (config.architectures or [""])[0]


def _model_class(config: PretrainedConfig) -> str:
    name = _architecture(config) or "no `architectures` in its config.json"
    if name.endswith("ForSequenceClassification"):
        return f"{name} with {config.num_labels} output{'s' * (config.num_labels != 1)}"
    return name

"""Read and check model configurations before any model is built. Custom code is never run."""

import contextlib
import math
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from common.runtime.files import exists, is_folder, is_local_path, read_json
from common.runtime.options import UserError, reason

Kind = Any  # a class such as AutoModelForCausalLM
HEADS = ("num_attention_heads", "num_key_value_heads")
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings",
    "num_hidden_layers", *HEADS,
)  # fmt: skip
MAX_LAYERS = 10_000  # building more takes minutes, even without values


def read_config(path: str) -> PretrainedConfig:
    """Read a configuration. Raises UserError, in one line, when it is missing or holds impossible values."""
    if exists(Path(path) / "adapter_config.json"):
        raise UserError(
            f"{path}: a peft adapter, not a model; give the merged model: `final/` of the run that made it,"
            " or the output of peft's merge_and_unload"
        )
    if is_folder(path):
        read_json(Path(path) / "config.json")
    elif is_local_path(path):
        raise UserError(f"{path}: No such folder; a model is a folder or a hub name")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - the file may hold anything
        source = Path(path) / "config.json" if is_folder(path) else f"{path}: not a model folder or hub name"
        raise UserError(f"{source}: {custom_code(path) or reason(error)}") from None
    _check_config(path, config)
    return config


def _check_config(path: str, config: PretrainedConfig) -> None:
    """Raise UserError for wrong sizes from which transformers would still build a model."""
    text, file = config.get_text_config(), Path(path) / "config.json"
    for name in SIZES:
        value = getattr(text, name, None)
        if isinstance(value, int | float | str) and (type(value) is not int or value < 1):
            own = text.attribute_map.get(name, name)
            raise UserError(f"{file}: {own} is {value!r}; it must be an integer above 0")
    if (layers := getattr(text, "num_hidden_layers", None) or 0) > MAX_LAYERS:
        raise UserError(f"{file}: num_hidden_layers is {layers}; it must be at most {MAX_LAYERS}")
    _check_numbers(file, text.to_dict())
    heads, groups = (getattr(text, name, None) for name in HEADS)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise UserError(f"{file}: {heads} attention heads are not a multiple of {groups} key-value heads")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{path}: quantised weights are not supported; give the model in 16 or 32 bits")
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: architectures is {names!r}; it must be a list of names")


def _check_numbers(file: Path, values: dict[str, Any]) -> None:
    """Raise UserError for a number that would make every output NaN, also in nested sections."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_numbers(file, value)
        if not isinstance(value, float | int):
            continue
        if math.isnan(value):
            raise UserError(f"{file}: {name} is {value!r}; it must be a number")
        if value < 0 and name.endswith(("eps", "epsilon")):
            raise UserError(f"{file}: {name} is {value!r}; it must not be below 0")
        if value <= 0 and name.endswith("rope_theta"):
            raise UserError(f"{file}: {name} is {value!r}; it must be above 0")


def custom_code(path: str, kind: Kind = AutoConfig) -> str:
    """Message that the model needs custom code, which is never run; empty if it does not."""
    code = ""
    with contextlib.suppress(Exception):  # a broken file is reported elsewhere
        code = PretrainedConfig.get_config_dict(path)[0]["auto_map"][kind.__name__]
    advice = "convert it, or use a class that transformers has"
    return code and f"needs custom code ({code}), which is not run; {advice}"

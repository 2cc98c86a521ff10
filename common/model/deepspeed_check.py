"""Check a DeepSpeed JSON before a model is loaded: by DeepSpeed's own parser, and where that checks nothing,
by the types of its defaults.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.model.nf4 import check_bitsandbytes
from common.runtime.distributed import on_cpu
from common.runtime.options import UserError, reason, world_size
from common.text.fields import shown

MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # and the packages they need
UNSET = {"number_checkpoints": 1, "output_file": ""}  # values of the type of keys whose default is null


def check_config(config: dict[str, Any], source: Path) -> None:
    """Raise UserError for what DeepSpeed would refuse now, or at the first step."""
    from deepspeed import DeepSpeedConfig

    own = {name: value for name, value in config.items() if name != "train_batch_size"}  # depends on ranks
    try:
        parsed = DeepSpeedConfig(own)
        defaults = vars(DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1}))
    except Exception as error:  # noqa: BLE001 - the file may hold anything
        raise UserError(f"{source}: DeepSpeed refuses it: {_reason(error)}") from None
    _check_types(config, {**defaults, "steps_per_print": 1}, source)
    for name in ("flops_profiler", "activation_checkpointing"):
        keys = vars(defaults[f"{name}_config"])
        given = {k: v for k, v in config.get(name, {}).items() if v is not None or keys.get(k, v) is not None}
        _check_types(given, {k: UNSET.get(k, v) for k, v in keys.items()}, source, f"{name}.")
    _check_types(config.get("aio") or {}, defaults["aio_config"], source, "aio.")
    for name, package in MONITORS.items():
        if config.get(name, {}).get("enabled") and not find_spec(package):
            raise UserError(f"{source}: {name} needs the package {package}; install it, or remove {name}")
    size = parsed.zero_config.zero_hpz_partition_size
    if size > 1 and world_size() % min(size, world_size()):
        raise UserError(
            f"{source}: zero_optimization.zero_hpz_partition_size is {size}; it must divide the"
            f" {world_size()} ranks: the GPUs of a node"
        )


def check_paging(config: dict[str, Any]) -> None:
    """Raise UserError where --paged_adamw does not work."""
    if on_cpu():
        raise UserError("--paged_adamw: needs an NVIDIA GPU, whose driver moves memory to the host")
    zero = config["zero_optimization"]
    if zero["stage"] == 3 or "offload_optimizer" in zero:
        raise UserError("--paged_adamw: allowed: ZeRO stage 0, 1 or 2 without offload_optimizer")
    check_bitsandbytes("paged_adamw")


def _check_types(given: dict[str, Any], defaults: dict[str, Any], source: Path, section: str = "") -> None:
    """Raise UserError for a value whose type is not that of the default, and for an unknown key of a section.

    A number must be above 0 if its default is.
    """
    for name, value in given.items():
        if section and name not in defaults:
            raise UserError(f"{source}: unknown key {section + name!r}; allowed: {' '.join(defaults)}")
        default, allowed = defaults.get(name), ""
        if isinstance(default, bool):
            allowed = "" if isinstance(value, bool) else "true or false"
        elif isinstance(default, int | float):
            is_number = type(value) in (int, float) and math.isfinite(value)
            is_clipping_off = name == "gradient_clipping" and value == 0
            is_allowed = is_number and (value > 0 or default <= 0 or is_clipping_off)
            allowed = "" if is_allowed else "a number above 0"
        elif isinstance(default, str):
            allowed = "" if isinstance(value, str) else "text"
        if allowed:
            raise UserError(f"{source}: {section}{name} is {shown(value)}; it must be {allowed}")


def _reason(error: Exception) -> str:
    """The first problem of a validation error, with its key and value; else the reason of the error."""
    if not hasattr(error, "errors"):
        return reason(error)
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))} is {shown(problem['input'])}: {problem['msg']}"

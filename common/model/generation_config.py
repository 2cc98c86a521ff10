"""Drop invalid values from generation_config.json: transformers would refuse to write them in `final/`."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from common.runtime.distributed import first_few, log_once
from common.runtime.files import read_json
from common.runtime.options import UserError, reason

FILE = "generation_config.json"


def read_generation_config(path: str, config: PretrainedConfig) -> GenerationConfig | None:
    """The valid part of the file in a model folder or on the hub; None if the file is valid or absent."""
    try:
        file = cached_file(path, FILE, _raise_exceptions_for_missing_entries=False)
        values = read_json(Path(file)) if file else {}
    except (OSError, UserError) as error:
        log_once(f"warning: {reason(error)}; the file is ignored")
        return GenerationConfig.from_model_config(config)
    return None if _is_valid(values) else _valid_part(values, path)


def writable(generation: GenerationConfig, path: str) -> GenerationConfig:
    """The configuration without values that transformers refuses to write."""
    return generation if _is_valid(generation.to_dict()) else _valid_part(generation.to_diff_dict(), path)


def _valid_part(values: dict[str, Any], path: str) -> GenerationConfig:
    valid: dict[str, Any] = {}
    while new := next((k for k in values if k not in valid and _is_valid({**valid, k: values[k]})), None):
        valid[new] = values[new]
    left_out = [f"{name} {value}" for name, value in values.items() if name not in valid]
    log_once(f"warning: {path}: invalid values in {FILE} are ignored: {first_few(left_out)}")
    return GenerationConfig(**valid)


def _is_valid(values: dict[str, Any]) -> bool:
    ids = [value for name, value in values.items() if name.endswith("_token_id")]
    flat = [i for value in ids for i in (value if isinstance(value, list) else [value])]
    if not all(i is None or type(i) is int for i in flat):
        return False
    try:
        GenerationConfig(**values).validate(strict=True)
    except Exception:  # noqa: BLE001 - the file may hold anything
        return False
    return True

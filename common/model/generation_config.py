"""generation_config.json of a model: what transformers refuses to write must not cost a run its result."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from common.runtime.distributed import log_once, some
from common.runtime.files import read_json
from common.runtime.options import UserError, reason

FILE = "generation_config.json"


def read_generation_config(path: str, config: PretrainedConfig) -> GenerationConfig | None:
    """What is valid in the file of a model folder or hub name; None when all of it is, or there is none."""
    try:
        file = cached_file(path, FILE, _raise_exceptions_for_missing_entries=False)
        values = read_json(Path(file)) if file else {}
    except (OSError, UserError) as error:
        log_once(f"warning: {reason(error)}; this file is ignored")
        return GenerationConfig.from_model_config(config)
    return None if _is_valid(values) else _valid_part(values, path)


def writable(generation: GenerationConfig, path: str) -> GenerationConfig:
    """The same, without values that transformers refuses to write."""
    return generation if _is_valid(generation.to_dict()) else _valid_part(generation.to_diff_dict(), path)


def _valid_part(values: dict[str, Any], path: str) -> GenerationConfig:
    kept: dict[str, Any] = {}
    while new := next((k for k in values if k not in kept and _is_valid({**kept, k: values[k]})), None):
        kept[new] = values[new]
    left_out = [f"{name} {value}" for name, value in values.items() if name not in kept]
    log_once(f"warning: {path}: {FILE} is not valid; ignored are: {some(left_out)}")
    return GenerationConfig(**kept)


def _is_valid(values: dict[str, Any]) -> bool:
    ids = [value for name, value in values.items() if name.endswith("_token_id")]
    flat = [one for value in ids for one in (value if isinstance(value, list) else [value])]
    if not all(one is None or type(one) is int for one in flat):
        return False
    try:
        GenerationConfig(**values).validate(strict=True)
    except Exception:  # noqa: BLE001 - whatever is in the file
        return False
    return True

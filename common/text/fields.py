"""Numbers, flags and lists in the fields of a record. They may be given as text, as in CSV files. Pure."""

import contextlib
import json
import math
from decimal import Decimal
from typing import Any

Record = dict[str, Any]

EMPTY = (None, "", [], {}, "[]", "{}", "null")
FLAGS = {"true": True, "false": False}
LISTS = (
    "messages", "conversations", "history", "responses", "ranks", "votes", "steps", "completions", "labels",
)  # fmt: skip
# Fields of text or messages.
TEXTS = (
    "prompt", "completion", "chosen", "rejected", "response", "response_a", "response_b",
    "messages", "conversations", "responses",
)  # fmt: skip


def number(record: Record, name: str, default: float = 0.0) -> float:
    """Read a finite number from a field. Raises ValueError with a message for the user."""
    value = record.get(name, default)
    if (parsed := as_number(value)) is None:
        raise ValueError(f"field {name!r} is {shown(value)}; it must be a number")
    return parsed


def flag(record: Record, name: str, default: bool | None = None) -> bool:
    """Read a boolean from a field. Raises ValueError with a message for the user."""
    value = record.get(name, default)
    parsed = FLAGS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(parsed, bool):
        raise ValueError(f"field {name!r} is {shown(value)}; it must be true or false")
    return parsed


def as_number(value: Any) -> float | None:
    """Convert a finite number, or its text, to float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    with contextlib.suppress(ValueError, OverflowError):
        return float(value) if math.isfinite(float(value)) else None
    return None


def is_empty(value: Any) -> bool:
    """Whether a field is empty, as it is in files where all records have all fields."""
    if isinstance(value, list | dict):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return (value.strip() if isinstance(value, str) else value) in EMPTY


def parse_lists(record: Record) -> Record:
    """Parse lists that are given as JSON text."""
    lists = {}
    for name in LISTS:
        value = record.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            with contextlib.suppress(ValueError):
                lists[name] = json.loads(value)
    return {**record, **lists} if lists else record


def remove_nulls(record: Record) -> Record:
    """Remove null fields from a record and from its messages."""
    present = {name: value for name, value in record.items() if value is not None}
    return {name: _present(value) if name in TEXTS else value for name, value in present.items()}


def check_characters(record: Record) -> None:
    """Raise ValueError for a lone surrogate: no tokenizer accepts it, and UTF-8 cannot store it."""
    if half := _half_character(record):
        name = next((name for name, value in record.items() if _half_character([name, value])), "")
        raise ValueError(
            f"field {name!r} has half a character ({half}): a tool has cut the text inside an emoji"
        )


def shown(value: Any) -> str:
    """Format a value for messages: one line, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _present(part) for name, part in value.items() if part is not None}
    return [_present(part) for part in value] if isinstance(value, list) else value


def _half_character(value: Any) -> str:
    """The first lone surrogate in a value, as an escape sequence; empty if there is none."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])[1:-1]
    return ""

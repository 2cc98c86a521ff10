"""Fields of a record that are more than text. Where a number, a flag or a list is needed, its text will do: a
cell of CSV has nothing else. Pure.
"""

import contextlib
import json
import math
from decimal import Decimal
from typing import Any

Record = dict[str, Any]

NOTHING = (None, "", [], {}, "[]", "{}", "null")
FLAGS = {"true": True, "false": False}
LISTS = ("messages", "conversations", "history", "responses", "ranks", "votes")
# Fields whose value is a text, or messages.
TEXTS = (
    "prompt", "completion", "chosen", "rejected", "response", "response_a", "response_b",
    "messages", "conversations", "responses",
)  # fmt: skip


def number(record: Record, name: str, default: float = 0.0) -> float:
    """A finite number. Raises ValueError, in words for the user."""
    value = record.get(name, default)
    if (parsed := as_number(value)) is None:
        raise ValueError(f"field {name!r} is {shown(value)}; it must be a number")
    return parsed


def flag(record: Record, name: str, default: bool | None = None) -> bool:
    """True or false. Raises ValueError, in words for the user."""
    value = record.get(name, default)
    parsed = FLAGS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(parsed, bool):
        raise ValueError(f"field {name!r} is {shown(value)}; it must be true or false")
    return parsed


def as_number(value: Any) -> float | None:
    """A finite number, or the text of one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    with contextlib.suppress(ValueError, OverflowError):
        return float(value) if math.isfinite(float(value)) else None
    return None


def is_nothing(value: Any) -> bool:
    """Whether a field is there only for the sake of other records of the file."""
    if isinstance(value, list | dict):
        return all(map(is_nothing, value.values() if isinstance(value, dict) else value))
    return (value.strip() if isinstance(value, str) else value) in NOTHING


def with_lists(record: Record) -> Record:
    """The record with the lists that it has as JSON text; the same one where there is none."""
    found = {}
    for name in LISTS:
        value = record.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            with contextlib.suppress(ValueError):
                found[name] = json.loads(value)
    return {**record, **found} if found else record


def without_nulls(record: Record) -> Record:
    """A null field is an absent field: in the record itself, and in its messages."""
    present = {name: value for name, value in record.items() if value is not None}
    return {name: _present(value) if name in TEXTS else value for name, value in present.items()}


def check_characters(record: Record) -> None:
    """Raise ValueError for a text with half a character in it, which no tokenizer takes and no file holds."""
    if half := _half_character(record):
        name = next((name for name, value in record.items() if _half_character([name, value])), "")
        raise ValueError(
            f"field {name!r} has half a character ({half}): a tool has cut the text within an emoji"
        )


def shown(value: Any) -> str:
    """A value in a message: on one line, and not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _present(part) for name, part in value.items() if part is not None}
    return [_present(part) for part in value] if isinstance(value, list) else value


def _half_character(value: Any) -> str:
    """The first lone surrogate anywhere in a value, written out; nothing in proper text."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return ascii(error.object[error.start])[1:-1]
    return ""

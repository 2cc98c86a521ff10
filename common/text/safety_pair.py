"""Convert records of PKU-SafeRLHF to a pair with signs of harm. Pure."""

from typing import Any

from common.text.fields import as_number, flag, is_empty, shown

RESPONSES = ("response_0", "response_1")
LABELS = ("better_response_id", "safer_response_id")


def is_safety_pair(record: dict[str, Any]) -> bool:
    return any(not is_empty(record.get(name)) for name in LABELS)


def from_safety_pair(record: dict[str, Any]) -> dict[str, Any]:
    """`chosen` is the better response, or without that label the safer one; `safer` names the safer one."""
    for name in RESPONSES:
        if name not in record:
            raise ValueError(f"field {name!r} is missing (a pair has 'response_0' + 'response_1')")
    ids = {name: _response_id(record, name) for name in LABELS if not is_empty(record.get(name))}
    first = next(iter(ids.values()))
    number_of = {"chosen": first, "rejected": 1 - first}
    converted = {**record, **{side: record[f"response_{n}"] for side, n in number_of.items()}}
    for side, number in number_of.items():
        if f"is_response_{number}_safe" in record:
            converted[f"{side}_is_harmful"] = not flag(record, f"is_response_{number}_safe")
        if number == ids.get("safer_response_id"):
            converted["safer"] = side
    return converted


def _response_id(record: dict[str, Any], name: str) -> int:
    if (number := as_number(record[name])) not in (0, 1):
        raise ValueError(f"field {name!r} is {shown(record[name])}; it must be 0 or 1")
    return int(number)

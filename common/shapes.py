"""Popular shapes of records, turned into the ones that Triptych documents. Pure.

ShareGPT    conversations: [{from, value}]                -> messages
Alpaca      instruction, input, output                    -> prompt, completion
HH          chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..." -> the same as messages
Arena       prompt, response_a, response_b, preference    -> prompt, chosen, rejected, perhaps tie
several raters: votes instead of preference, a list       -> the same, by majority
soft labels: a number as preference, the probability of A -> the same, and how sure it is of chosen
"""

import math
import re
from collections import Counter
from typing import Any

from common.formatting import has_ended

Record = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "system": "system",
}  # fmt: skip
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
SURE = "chosen_probability"  # a field of our own: one that comes with a record is not taken for it
PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}  # as the probability that A is better


def recognise(record: Record) -> Record:
    """The record in a documented shape; one that is in none of the shapes above comes back as it is.

    Raises ValueError, in words for the user, for a record that is almost of such a shape.
    """
    if SURE in record:
        record = {name: value for name, value in record.items() if name != SURE}
    if "conversations" in record and "messages" not in record:
        return {**record, "messages": _from_sharegpt(record["conversations"])}
    if "instruction" in record and "prompt" not in record:
        return _from_alpaca(record)
    if "response_a" in record or "response_b" in record:
        return _from_comparison(record)
    if "prompt" not in record and _is_hh(record.get("chosen")) and _is_hh(record.get("rejected")):
        return {**record, **{side: _from_hh(record[side]) for side in ("chosen", "rejected")}}
    return record


def agreement(record: Record) -> float:
    """Share of the raters of a pair who say what most of them say; NaN for a record without votes."""
    votes = [str(vote).lower() for vote in record.get("votes", [])]
    return max(Counter(votes).values()) / len(votes) if votes else math.nan


def _from_sharegpt(conversation: Any) -> list[dict[str, str]]:
    if not isinstance(conversation, list):
        raise ValueError(f"field 'conversations' is {type(conversation).__name__}; it must be a list")
    messages = []
    for number, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise ValueError(f"field 'conversations': turn {number} must have 'from' and 'value'")
        if turn["from"] not in SHAREGPT_ROLES:
            raise ValueError(
                f"field 'conversations': turn {number} is from {turn['from']!r};"
                f" allowed: {' '.join(SHAREGPT_ROLES)}"
            )
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return messages


def _from_alpaca(record: Record) -> Record:
    parts = [record["instruction"], record.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("fields 'instruction' and 'input' must be strings")
    text = "\n\n".join(part for part in parts if part.strip())
    found = {**record, "prompt": [{"role": "user", "content": text}] if text else ""}
    return {**found, "completion": record["output"]} if "output" in record else found


def _from_comparison(record: Record) -> Record:
    for name in ("response_a", "response_b"):
        if name not in record:
            raise ValueError(f"field {name!r} is missing (a comparison has 'response_a' + 'response_b')")
    a = _majority(record["votes"]) if "votes" in record else _probability(record.get("preference"))
    sides = ["response_a", "response_b"]
    renamed = dict(zip(("chosen", "rejected"), sides if a >= 0.5 else sides[::-1], strict=True))
    says = {"tie": a == 0.5, SURE: max(a, 1 - a)}
    texts = {new: record[old] for new, old in renamed.items()}
    flags = {
        f"{new}_ended": has_ended(record, f"{old}_ended")
        for new, old in renamed.items()
        if f"{old}_ended" in record
    }
    return {**record, **texts, **flags, **says}


def _majority(votes: Any) -> float:
    """What more raters say than anything else; a tie when two answers have as many votes."""
    if not isinstance(votes, list) or not votes:
        raise ValueError("field 'votes' must be a list of A, B or tie, one per rater")
    counts = Counter(_preference(vote) for vote in votes)
    return 0.5 if counts[1.0] == counts[0.0] else max(PREFERENCES.values(), key=lambda said: counts[said])


def _probability(value: Any) -> float:
    """That A is better: what a single rater says, or how sure a model is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _preference(value)
    if not 0 <= value <= 1:
        raise ValueError(f"preference is {value!r}; a number must be the probability of A, from 0 to 1")
    return float(value)


def _preference(value: Any) -> float:
    if str(value).lower() not in PREFERENCES:
        raise ValueError(f"preference is {value!r}; allowed: A B tie, or the probability of A")
    return PREFERENCES[str(value).lower()]


def _is_hh(text: Any) -> bool:
    return isinstance(text, str) and HH_TURN.match(text) is not None


def _from_hh(text: str) -> list[dict[str, str]]:
    _, *parts = HH_TURN.split(text)  # name, text, name, text, ...
    names, contents = parts[::2], parts[1::2]
    return [
        {"role": HH_ROLES[name], "content": content.strip()}
        for name, content in zip(names, contents, strict=True)
    ]

"""Popular shapes of records, turned into the ones that Triptych documents. Pure.

ShareGPT    conversations: [{from, value}]                -> messages
            the same before chosen and rejected           -> prompt, chosen, rejected
Alpaca      instruction, input, output                    -> prompt, completion
            the same with history                         -> messages
HH          chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..." -> the same as messages
Arena       prompt, response_a, response_b, preference    -> prompt, chosen, rejected, perhaps tie
several raters: votes instead of preference, a list       -> the same, by majority
KTO         kto_tag                                       -> label
soft labels: a number as preference, the probability of A -> the same, and how sure it is of chosen

`system` beside any of these becomes the first message.
"""

import math
import re
from collections import Counter
from typing import Any

from common.fields import as_number, shown, with_lists
from common.formatting import has_ended

Record = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "system": "system",
}  # fmt: skip
# Fields that other tools put into what a model reads. Dropping them would teach something else.
UNSUPPORTED = ("tools", "functions", "chat_template_kwargs", "images", "videos", "audios")
NOTHING = (None, "", [], {}, "[]", "{}")
SYSTEM = ("system", "system_prompt")  # a system message beside the dialogue
PAIR = ("chosen", "rejected")
DIALOGUES = ("messages", "conversations", "prompt", "completion", *PAIR, "response_a", "response_b")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
SURE = "chosen_probability"  # a field of our own: one that comes with a record is not taken for it
PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}  # as the probability that A is better


def recognise(record: Record) -> Record:
    """The record in a documented shape; one that is in none of the shapes above comes back as it is.

    Raises ValueError, in words for the user, for a record that is almost of such a shape, and for one with a
    field that changes what the model reads in a way that is not supported.
    """
    if SURE in record:
        record = {name: value for name, value in record.items() if name != SURE}
    for name in UNSUPPORTED:
        if not _is_nothing(record.get(name)):
            raise ValueError(f"field {name!r} changes what a model reads, and is not supported; leave it out")
    record = _as_messages(with_lists(record))
    if "conversations" in record and "messages" not in record:
        record = _from_conversations(record)
    if "prompt" not in record and all(_is_hh(record.get(side)) for side in PAIR):
        record = {**record, **{side: _from_hh(record[side]) for side in PAIR}}
    elif "prompt" not in record and "messages" in record and all(_is_answer(record.get(s)) for s in PAIR):
        record = {**record, "prompt": record["messages"]}
    elif "prompt" not in record and "instruction" in record:
        record = _from_alpaca(record)
    if "response_a" in record or "response_b" in record:
        record = _from_comparison(record)
    if "kto_tag" in record and "label" not in record:
        record = {**record, "label": record["kto_tag"]}
    return _with_system(record)


def agreement(record: Record) -> float:
    """Share of the raters of a pair who say what most of them say; NaN for a record without votes."""
    votes = [str(vote).lower() for vote in record.get("votes", [])]
    return max(Counter(votes).values()) / len(votes) if votes else math.nan


def _is_nothing(value: Any) -> bool:
    """Whether a field is there only for the sake of other records of the file."""
    return (value.strip() if isinstance(value, str) else value) in NOTHING


def _as_messages(record: Record) -> Record:
    """Turns of ShareGPT as messages, in whatever field they are, and a single message as a list of one."""
    found = {}
    for name in DIALOGUES:
        value = record.get(name)
        turns = [value] if isinstance(value, dict) else value
        if isinstance(turns, list) and any(map(_is_turn, turns)):
            found[name] = [_message(name, number, turn) for number, turn in enumerate(turns)]
        elif isinstance(value, dict) and {"role", "content"} <= value.keys():
            found[name] = [value]
    return {**record, **found} if found else record


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and "from" in turn and "role" not in turn


def _message(name: str, number: int, turn: Any) -> dict[str, Any]:
    """A turn as a message, with whatever further fields it has."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise ValueError(f"field {name!r}: turn {number} must have 'from' and 'value'")
    if turn["from"] not in SHAREGPT_ROLES:
        raise ValueError(
            f"field {name!r}: turn {number} is from {shown(turn['from'])};"
            f" allowed: {' '.join(SHAREGPT_ROLES)}"
        )
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"], **others}


def _from_conversations(record: Record) -> Record:
    value = record["conversations"]
    if not isinstance(value, list):
        raise ValueError(f"field 'conversations' is {type(value).__name__}; it must be a list")
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise ValueError(f"field 'conversations': turn {number} must have 'from' and 'value'")
    return {**record, "messages": value}


def _is_answer(side: Any) -> bool:
    """Whether a response is one alone, rather than a whole dialogue."""
    is_list = isinstance(side, list) and side and isinstance(side[0], dict)
    return isinstance(side, str) or bool(is_list and side[0].get("role") == "assistant")


def _with_system(record: Record) -> Record:
    """The record with the text of `system` as its first message. Raises ValueError where it has no place."""
    name = next((name for name in SYSTEM if not _is_nothing(record.get(name))), "")
    if not name:
        return record
    text = record[name]
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is {type(text).__name__}; it must be a string")
    first = {"role": "system", "content": text}
    dialogues = [place for place in ("prompt", "messages") if isinstance(record.get(place), list)]
    if not dialogues:  # whole dialogues, perhaps with their question as a string
        dialogues = [place for place in PAIR if isinstance(record.get(place), list)]
        dialogues = [place for place in dialogues if not _is_answer(record[place])]
    if not dialogues:
        raise ValueError(
            f"field {name!r} has no place before a prompt that is a string, which is used verbatim; write"
            " the prompt as a list of messages"
        )
    found = {}
    for place in dialogues:
        begin = next(iter(record[place]), None)
        if begin == first:
            continue
        if isinstance(begin, dict) and begin.get("role") == "system":
            raise ValueError(f"field {name!r} and the first of {place!r} are two different system messages")
        found[place] = [first, *record[place]]
    return {**record, **found}


def _from_alpaca(record: Record) -> Record:
    """The turns of `history` are learnt like any of a dialogue, as LLaMA-Factory documents it."""
    parts = [record["instruction"], record.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("fields 'instruction' and 'input' must be strings")
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise ValueError("fields 'instruction' and 'input' are empty")
    asked = [*_from_history(record.get("history") or []), {"role": "user", "content": text}]
    found = {**record, "prompt": asked}
    if "output" not in record:
        return found
    reply = {"role": "assistant", "content": record["output"]}
    if asked[1:] and "messages" not in record:
        return {**record, "messages": [*asked, reply]}
    return {**found, "completion": record["output"]}


def _from_history(turns: Any) -> list[dict[str, str]]:
    is_pairs = isinstance(turns, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in turns)
    if not is_pairs or not all(isinstance(text, str) for turn in turns for text in turn):
        raise ValueError("field 'history' must be a list of pairs, a question and its answer, all strings")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


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
    if (found := as_number(value)) is None:
        return _preference(value)
    if not 0 <= found <= 1:
        raise ValueError(f"preference is {value!r}; a number must be the probability of A, from 0 to 1")
    return found


def _preference(value: Any) -> float:
    if (word := str(value).strip().lower()) not in PREFERENCES:
        raise ValueError(f"preference is {shown(value)}; allowed: A B tie, or the probability of A")
    return PREFERENCES[word]


def _is_hh(text: Any) -> bool:
    return isinstance(text, str) and HH_TURN.match(text) is not None


def _from_hh(text: str) -> list[dict[str, str]]:
    _, *parts = HH_TURN.split(text)  # name, text, name, text, ...
    names, contents = parts[::2], parts[1::2]
    return [
        {"role": HH_ROLES[name], "content": content.strip()}
        for name, content in zip(names, contents, strict=True)
    ]

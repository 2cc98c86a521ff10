"""Convert popular record formats to the ones that Triptych documents. Pure.

ShareGPT    conversations: [{from, value}]                -> messages
            the same before chosen and rejected           -> prompt, chosen, rejected
Alpaca      instruction, input, output                    -> prompt, completion
            the same with history                         -> messages
Dolly       instruction, context, response                -> prompt, completion
Orca        question, response or answer                  -> prompt, completion
HH          chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..." -> the same as messages
Arena       prompt, response_a, response_b, preference    -> prompt, chosen, rejected, optional tie
several raters: votes instead of preference, a list       -> the same, by majority
KTO         kto_tag                                       -> label
PRM800K     question: {problem}, label: {steps}           -> prompt, steps, labels
Shepherd    input: "... Step 1: ... ки", label            -> the same
soft labels: preference is a number, the probability of A -> the same, and the probability of chosen
scores      prompt, response, score                       -> prompt, completion, score
PKU-SafeRLHF response_0, response_1 and their labels      -> prompt, chosen, rejected, signs of harm

In all formats, `system` becomes the first message.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from common.text.fields import as_number, is_empty, parse_lists, shown
from common.text.prompt_boundary import is_answer
from common.text.safety_pair import from_safety_pair, is_safety_pair
from common.text.scored_response import as_completion
from common.text.segments import has_ended
from common.text.step_formats import as_steps
from common.text.system_message import insert_system

Record = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "system": "system",
}  # fmt: skip
# Fields that change the input of the model. Without them, training data would be wrong.
UNSUPPORTED = ("tools", "functions", "documents", "chat_template_kwargs", "images", "videos", "audios")
QUESTIONS = ("instruction", "question")
INPUTS = ("input", "context")  # context of a question
ANSWERS = ("output", "response", "answer")
PAIR = ("chosen", "rejected")
DIALOGUES = ("messages", "conversations", "prompt", "completion", *PAIR, "response_a", "response_b")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
CHOSEN_PROBABILITY = "chosen_probability"  # set by `normalise_record`; removed from input records
PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}  # probability that A is better


def normalise_record(record: Record) -> Record:
    """Convert a record to a documented format; records in no format above are returned unchanged.

    Raises ValueError, with a message for the user, for an invalid record of such a format and for unsupported
    fields.
    """
    if CHOSEN_PROBABILITY in record:
        record = {name: value for name, value in record.items() if name != CHOSEN_PROBABILITY}
    for name in UNSUPPORTED:
        if not is_empty(record.get(name)):
            raise ValueError(f"field {name!r} changes the input of the model and is not supported; remove it")
    record = _as_messages(parse_lists(as_steps(as_completion(record))))
    if not any(name in record for name in QUESTIONS):
        _check_parts_of_prompt(record)
    if "conversations" in record and "messages" not in record:
        record = _from_conversations(record)
    if "prompt" not in record and all(_is_hh(record.get(side)) for side in PAIR):
        record = {**record, **{side: _from_hh(record[side]) for side in PAIR}}
    elif "prompt" not in record and "messages" in record and all(is_answer(record.get(s)) for s in PAIR):
        record = {**record, "prompt": _without_last_replies(record["messages"])}
    elif "prompt" not in record and ("instruction" in record or _is_question(record)):
        record = _from_alpaca(record)
    if "response_a" in record or "response_b" in record:
        record = _from_comparison(record)
    elif is_safety_pair(record):
        record = from_safety_pair(record)
    if "kto_tag" in record and "label" not in record:
        record = {**record, "label": record["kto_tag"]}
    return insert_system(record)


def agreement(record: Record) -> float:
    """Share of a pair's raters who agree with the majority; NaN for a record without votes."""
    votes = [str(vote).lower() for vote in record.get("votes", [])]
    return max(Counter(votes).values()) / len(votes) if votes else math.nan


def _as_messages(record: Record) -> Record:
    """Convert ShareGPT turns in any field to messages, and a single message to a list."""
    converted = {}
    for name in DIALOGUES:
        value = record.get(name)
        turns = [value] if isinstance(value, dict) else value
        if isinstance(turns, list) and any(map(_is_turn, turns)):
            converted[name] = [_message(name, number, turn) for number, turn in enumerate(turns)]
        elif isinstance(value, dict) and {"role", "content"} <= value.keys():
            converted[name] = [value]
    return {**record, **converted} if converted else record


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and "from" in turn and "role" not in turn


def _message(name: str, number: int, turn: Any) -> dict[str, Any]:
    """Convert a ShareGPT turn to a message; keeps further fields."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise ValueError(f"field {name!r}: turn {number} must have 'from' and 'value'")
    if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
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


def _is_question(record: Record) -> bool:
    """Whether `question` is the prompt; in records with dialogues it is only metadata."""
    return "question" in record and "messages" not in record and not _is_in_dialogues(record)


def _is_in_dialogues(record: Record) -> bool:
    """Whether chosen and rejected are dialogues that include the question."""
    return all(isinstance(record.get(side), list) and not is_answer(record[side]) for side in PAIR)


def _from_alpaca(record: Record) -> Record:
    """Convert an Alpaca record. Replies in `history` are trained on too, as in LLaMA-Factory."""
    name, extra = (_only_one(record, names) for names in (QUESTIONS, INPUTS))
    parts = [record[name], record.get(extra) or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"fields {name!r} and {extra!r} must be strings")
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise ValueError(f"fields {name!r} and {extra!r} are empty")
    history = _from_history(record.get("history") or [])
    if not history and _is_in_dialogues(record):
        return {**record, "prompt": text}  # it must be one of their user messages
    asked = [*history, {"role": "user", "content": text}]
    prompted = {**record, "prompt": asked}
    answers = sorted((name for name in ANSWERS if name in record), key=lambda name: is_empty(record[name]))
    answer = next(iter(answers), "")
    if not answer or "completion" in record:
        return prompted
    if history and "messages" not in record:
        return {**record, "messages": [*asked, {"role": "assistant", "content": record[answer]}]}
    return {**prompted, "completion": record[answer]}


def _only_one(record: Record, names: Sequence[str]) -> str:
    """The non-empty field among fields with the same meaning; the first one if all are empty."""
    full = [name for name in names if not is_empty(record.get(name))]
    if len(full) > 1:
        raise ValueError(f"fields {full[0]!r} and {full[1]!r} have the same meaning; keep only one of them")
    return (full or [name for name in names if name in record] or names)[0]


def _check_parts_of_prompt(record: Record) -> None:
    """Raise ValueError for `history` or an input field without its question: it would be lost."""
    has_messages = any(isinstance(record.get(name), list) for name in DIALOGUES)
    for name in ["history"] if has_messages else ["history", *INPUTS]:
        if not is_empty(record.get(name)):
            raise ValueError(
                f"field {name!r} needs 'instruction' or 'question'; make it part of the prompt, or remove it"
            )


def _without_last_replies(messages: Any) -> Any:
    """Remove assistant messages at the end, so that the rest is a prompt."""
    end = len(messages) if isinstance(messages, list) else 0
    while end and isinstance(messages[end - 1], dict) and messages[end - 1].get("role") == "assistant":
        end -= 1
    return messages[:end] if end else messages


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
    label = {"tie": a == 0.5, CHOSEN_PROBABILITY: max(a, 1 - a)}
    texts = {new: record[old] for new, old in renamed.items()}
    flags = {
        f"{new}_ended": has_ended(record, f"{old}_ended")
        for new, old in renamed.items()
        if f"{old}_ended" in record
    }
    return {**record, **texts, **flags, **label}


def _majority(votes: Any) -> float:
    """The most frequent vote; a tie if A and B have the same number of votes."""
    if not isinstance(votes, list) or not votes:
        raise ValueError("field 'votes' must be a list of A, B or tie, one per rater")
    counts = Counter(_preference(vote) for vote in votes)
    return 0.5 if counts[1.0] == counts[0.0] else max(PREFERENCES.values(), key=counts.__getitem__)


def _probability(value: Any) -> float:
    """Probability that A is better: from a single rater's choice, or given as a number."""
    if (probability := as_number(value)) is None:
        return _preference(value)
    if not 0 <= probability <= 1:
        raise ValueError(f"preference is {value!r}; a number must be the probability of A, from 0 to 1")
    return probability


def _preference(value: Any) -> float:
    if (word := str(value).strip().lower()) not in PREFERENCES:
        raise ValueError(f"preference is {shown(value)}; allowed: A B tie, or the probability of A")
    return PREFERENCES[word]


def _is_hh(text: Any) -> bool:
    return isinstance(text, str) and HH_TURN.match(text) is not None


def _from_hh(text: str) -> list[dict[str, str]]:
    _, *parts = HH_TURN.split(text)  # name, text, name, text, ...
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": HH_ROLES[name], "content": content.strip()} for name, content in turns]

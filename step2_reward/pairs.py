"""Pairs of responses for annotation, and golden questions: pairs with a known answer."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from common.data.records import read_all
from common.runtime.distributed import log
from common.runtime.options import UserError
from common.text.conversation import Message
from common.text.record_formats import Record, normalise_record
from common.text.segments import Comparison, has_ended, parse_comparison, preference_segments

Text = str | list[Message]
ANSWERS = {"preference", "votes"}  # fields that make a pair a golden question
SIDES = ("response_a", "response_b")
ANSWERED_FORMATS = {"chosen", "rejected", "responses", "ranks"}  # fields of formats that contain the answer


class Pair(NamedTuple):
    """Two responses to a prompt."""

    id: str  # hash of prompt and responses
    record: Record  # as read
    prompt: Text
    responses: dict[str, Text]  # A and B
    answer: str = ""  # of a golden question: A, B or tie
    ended: dict[str, bool] = {}  # A and B: false for a truncated response; empty if unknown

    @property
    def longer(self) -> str:
        """A or B, by characters; empty when the lengths are equal."""
        a, b = (sum(len(text) for _, text in turns(self.responses[side])) for side in "AB")
        return "" if a == b else "A" if a > b else "B"


def read_pairs(sources: Sequence[str], golden: Sequence[str], skip_bad_records: bool) -> list[Pair]:
    """Read all distinct pairs; golden questions come last.

    golden: sources of golden questions only, in any preference format of step 2. Raises UserError naming file
    and line of a bad record, and when all pairs are golden questions.
    """
    by_id: dict[str, Pair] = {}
    bad = duplicates = 0
    for parse, names in ((_golden_pair, golden), (to_pair, sources)):
        pairs, num_bad = read_all(names, parse, skip_bad_records, is_training=names is sources)
        bad += num_bad
        for pair in pairs:
            duplicates += pair.id in by_id
            if pair.answer or pair.id not in by_id:
                by_id[pair.id] = pair
    for count, reason in ((bad, "bad records skipped"), (duplicates, "duplicate pairs skipped")):
        if count:
            log(f"{' '.join([*sources, *golden])}: {count} {reason}")
    pairs = sorted(by_id.values(), key=lambda pair: bool(pair.answer))
    if pairs[0].answer:
        why = f"all {len(pairs)} have an answer, so they are golden questions"
        raise UserError(f"{' '.join(sources)}: no pairs to compare ({why})")
    return pairs


def _golden_pair(record: Record) -> Pair:
    pair = to_pair(record)
    if not pair.answer:
        raise ValueError("a golden question needs its answer, as 'preference'")
    return pair


def to_pair(record: Record) -> Pair:
    """Parse a record as a pair. Raises ValueError, with a message for the user, where step 2 would."""
    record = {name: value for name, value in record.items() if value is not None}
    if record.keys() & ANSWERED_FORMATS and not record.keys() & set(SIDES):
        is_known, compared = True, parse_comparison(normalise_record(record))
    else:
        is_known, compared = bool(record.keys() & ANSWERS), _sides(record)
    if len(compared.responses) != 2:
        raise ValueError(f"has {len(compared.responses)} responses; a pair has two")
    preference_segments(compared, _render, "\0")  # raises the errors of step 2
    first, second = compared.responses.values()
    a, b = compared.ranks
    content = json.dumps([compared.prompt, first, second], sort_keys=True)
    return Pair(
        hashlib.blake2b(content.encode(), digest_size=8).hexdigest(),
        record,
        compared.prompt,
        {"A": first, "B": second},
        ("tie" if a == b else "A" if a < b else "B") if is_known else "",
        _ended(record, SIDES if record.keys() & set(SIDES) else (*compared.responses,)),
    )


def ended_fields(pair: Pair) -> dict[str, bool]:
    """Return `response_a_ended` and `response_b_ended`, if known."""
    return {f"{SIDES['AB'.index(side)]}_ended": ended for side, ended in pair.ended.items()}


def _ended(record: Record, names: Sequence[str]) -> dict[str, bool]:
    return {
        side: has_ended(record, f"{name}_ended")
        for side, name in zip("AB", names, strict=True)
        if f"{name}_ended" in record
    }


def turns(text: Text) -> list[tuple[str, str]]:
    """Split a text into (role, content); the role of a string is empty."""
    if isinstance(text, str):
        return [("", text)]
    return [(message["role"], message["content"]) for message in text]


def _sides(record: Record) -> Comparison:
    """Parse `response_a` and `response_b`, in this order, with the ranks of their answer if known."""
    missing = [name for name in SIDES if name not in record]
    normalised = {} if missing else normalise_record({"preference": "A", **record})
    missing += [] if missing or "prompt" in normalised else ["prompt"]
    if missing:
        raise ValueError(
            f"field {missing[0]!r} is missing (a pair has 'prompt' + 'response_a' + 'response_b')"
        )
    first, second = (normalised[name] for name in SIDES)
    try:
        compared = parse_comparison({"prompt": normalised["prompt"], "chosen": first, "rejected": second})
    except ValueError as error:
        message = str(error).replace("'chosen'", repr(SIDES[0])).replace("'rejected'", repr(SIDES[1]))
        raise ValueError(message) from None
    is_a_chosen = normalised["chosen"] == first
    return compared._replace(ranks=[0, 0] if normalised["tie"] else [0, 1] if is_a_chosen else [1, 0])


def _render(messages: Sequence[Message], add_generation_prompt: bool) -> str:  # noqa: ARG001 - signature of chat templates
    """Render messages so that a longer conversation continues a shorter one."""
    return "".join(f"{message['role']}\0{message['content']}\0" for message in messages)

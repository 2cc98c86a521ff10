"""Pairs of responses that people compare, and golden questions among them, whose answer is known."""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

from common.data.records import read_all
from common.runtime.distributed import log
from common.runtime.options import UserError
from common.text.conversation import Message
from common.text.record_formats import Record, recognise
from common.text.segments import Comparison, comparison, has_ended, preference_segments

Text = str | list[Message]
ANSWERS = {"preference", "votes"}  # fields that make a golden question of a pair
SIDES = ("response_a", "response_b")
OTHER_SHAPES = {"chosen", "rejected", "responses", "ranks"}  # in which step 2 reads known answers


class Pair(NamedTuple):
    """Two responses to a prompt."""

    id: str  # of prompt and responses, wherever they stand
    record: Record  # as it was read
    prompt: Text
    responses: dict[str, Text]  # A and B
    answer: str = ""  # of a golden question: A, B or tie
    ended: dict[str, bool] = {}  # A and B: false for a response that was cut; empty where it is not known

    @property
    def longer(self) -> str:
        """A or B, by characters; nothing when both are as long."""
        a, b = (sum(len(text) for _, text in turns(self.responses[side])) for side in "AB")
        return "" if a == b else "A" if a > b else "B"


def read_pairs(sources: Sequence[str], golden: Sequence[str], skip_bad_records: bool) -> list[Pair]:
    """All different pairs, those to compare first.

    golden: sources whose records all have an answer, in any shape that step 2 reads. Raises UserError naming
    file and line of a bad record, and when there is nothing to compare.
    """
    found: dict[str, Pair] = {}
    bad = same = 0
    for parse, names in ((_golden_pair, golden), (to_pair, sources)):
        pairs, bad_ones = read_all(names, parse, skip_bad_records, is_training=names is sources)
        bad += bad_ones
        for pair in pairs:
            same += pair.id in found
            if pair.answer or pair.id not in found:
                found[pair.id] = pair
    for count, reason in ((bad, "bad records are left out"), (same, "pairs are there twice and asked once")):
        if count:
            log(f"{' '.join([*sources, *golden])}: {count} {reason}")
    pairs = sorted(found.values(), key=lambda pair: bool(pair.answer))
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
    """A record as a pair. Raises ValueError, in words for the user, for one that step 2 would not take."""
    record = {name: value for name, value in record.items() if value is not None}
    if record.keys() & OTHER_SHAPES and not record.keys() & set(SIDES):
        is_known, compared = True, comparison(recognise(record))
    else:
        is_known, compared = bool(record.keys() & ANSWERS), _sides(record)
    if len(compared.responses) != 2:
        raise ValueError(f"has {len(compared.responses)} responses; a pair has two")
    preference_segments(compared, _render, "\0")  # raises what step 2 would
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
    """`response_a_ended` and `response_b_ended`, as far as they are known."""
    return {f"{SIDES['AB'.index(side)]}_ended": ended for side, ended in pair.ended.items()}


def _ended(record: Record, names: Sequence[str]) -> dict[str, bool]:
    return {
        side: has_ended(record, f"{name}_ended")
        for side, name in zip("AB", names, strict=True)
        if f"{name}_ended" in record
    }


def turns(text: Text) -> list[tuple[str, str]]:
    """Who says what; nobody is named where there is one string."""
    if isinstance(text, str):
        return [("", text)]
    return [(message["role"], message["content"]) for message in text]


def _sides(record: Record) -> Comparison:
    """`response_a` and `response_b`, in this order, with the ranks of their answer if there is one."""
    missing = [name for name in SIDES if name not in record]
    found = {} if missing else recognise({"preference": "A", **record})
    missing += [] if missing or "prompt" in found else ["prompt"]
    if missing:
        raise ValueError(
            f"field {missing[0]!r} is missing (a pair has 'prompt' + 'response_a' + 'response_b')"
        )
    first, second = (found[name] for name in SIDES)
    try:
        compared = comparison({"prompt": found["prompt"], "chosen": first, "rejected": second})
    except ValueError as error:
        said = str(error).replace("'chosen'", repr(SIDES[0])).replace("'rejected'", repr(SIDES[1]))
        raise ValueError(said) from None
    return compared._replace(ranks=[0, 0] if found["tie"] else [0, 1] if found["chosen"] == first else [1, 0])


def _render(messages: Sequence[Message], add_generation_prompt: bool) -> str:  # noqa: ARG001 - as templates do
    """Any text of which the longer conversation is a continuation."""
    return "".join(f"{message['role']}\0{message['content']}\0" for message in messages)

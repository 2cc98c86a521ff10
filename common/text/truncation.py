"""What happens to a record that is longer than the model may read. Pure, but for the encoder it is given."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, assert_never

from common.text.conversation import Message, Segment
from common.text.segments import demonstration_segments, plain_demonstration
from common.text.tokenizer import SegmentEncoder

Prompt = str | list[Message]


class Dropped(Exception):
    """A record is left out by the length policy; its text is the reason."""


class Fitted(NamedTuple):
    """Token ids of prompt and response, and for each whether it belongs to a response."""

    ids: list[int]
    is_response: list[bool]

    @property
    def start(self) -> int:
        """Where the last response begins; the number of tokens when there is none."""
        place = len(self.ids)
        while place and self.is_response[place - 1]:
            place -= 1
        return place


def fit(
    prompt: Prompt, segments_of: Callable[[Prompt], Sequence[Sequence[Segment]]], encoder: SegmentEncoder,
    max_length: int, overlong: str, keep_end: bool = False,
) -> tuple[list[Fitted], bool]:  # fmt: skip
    """Encode the responses to one prompt, each of at most `max_length` tokens, and say whether any was cut.

    segments_of: from a prompt, which may have lost its oldest messages, to the segments of each response with
    it. overlong: `truncate_prompt` takes the oldest messages away, then tokens at the left, but never BOS nor
    the whole prompt; `truncate_response` cuts at the right, with `keep_end` leaving the last token, an EOS.
    Responses to the same prompt keep the same part of it.

    Raises Dropped when the policy leaves nothing to learn from, or is `drop`; ValueError when it is `error`.
    """
    rows = [Fitted(*encoder.encode(segments)) for segments in segments_of(prompt)]
    longest = max(len(row.ids) for row in rows)
    if longest <= max_length:
        return rows, False
    match overlong:
        case "error":
            raise ValueError(f"has {longest} tokens, more than {max_length} (--overlong error)")
        case "drop":
            raise Dropped("too long")
        case "truncate_response":
            cut = [_cut_response(row, max_length, keep_end) for row in rows]
        case "truncate_prompt":
            cut = _cut_prompt(rows, prompt, segments_of, encoder, max_length)
        case _:
            assert_never(overlong)
    if len(cut) > 1 and all(row.ids == cut[0].ids for row in cut):
        raise Dropped("responses alike once cut")
    return cut, True


def fit_demonstration(
    record: dict[str, Any], encoder: SegmentEncoder, max_length: int, overlong: str, keep_end: bool = False
) -> tuple[Fitted, bool]:
    """`fit` for a demonstration, whose last reply is the response.

    keep_end: it is to be scored, and ends in EOS also where it was cut, as in step 3.
    """
    record = plain_demonstration(record)
    if keep_end:
        record = {**record, "ended": True}
    name = "messages" if "messages" in record else "prompt"

    def segments(prompt: Prompt) -> list[list[Segment]]:
        shorter = {**record, name: prompt} if name in record else record
        return [demonstration_segments(shorter, encoder.render, encoder.tokenizer.eos_token)]

    (row,), is_cut = fit(record.get(name, ""), segments, encoder, max_length, overlong, keep_end)
    return row, is_cut


def _cut_response(row: Fitted, max_length: int, keep_end: bool) -> Fitted:
    if row.start >= max_length - keep_end:
        raise Dropped("prompt too long")
    if len(row.ids) <= max_length:
        return row
    end = max_length - keep_end
    return Fitted(*(part[:end] + part[-1:] * keep_end for part in row))


def _cut_prompt(
    rows: list[Fitted], prompt: Prompt, segments_of: Callable[[Prompt], Sequence[Sequence[Segment]]],
    encoder: SegmentEncoder, max_length: int,
) -> list[Fitted]:  # fmt: skip
    for shorter in _without_oldest(prompt):
        rows = [Fitted(*encoder.encode(segments)) for segments in segments_of(shorter)]
        if max(len(row.ids) for row in rows) <= max_length:
            return rows
    bos = len(encoder.bos)
    excess = max(len(row.ids) for row in rows) - max_length
    if excess >= min(row.start for row in rows) - bos:
        raise Dropped("response too long")
    return [Fitted(*(part[:bos] + part[bos + excess :] for part in row)) for row in rows]


def _without_oldest(prompt: Prompt) -> Iterator[list[Message]]:
    """The conversation from its second question on, from its third on, ...; what the system says stays."""
    if isinstance(prompt, str):
        return
    system = [message for message in prompt[:1] if message["role"] == "system"]
    questions = [place for place, message in enumerate(prompt) if message["role"] == "user"]
    for place in questions[1:]:
        yield system + prompt[place:]

"""Length policies for records longer than the context length (--overlong). Pure, given the encoder."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, assert_never

from common.text.conversation import Message, Segment
from common.text.segments import demonstration_segments, plain_demonstration
from common.text.tokenizer import SegmentEncoder

Prompt = str | list[Message]


class Dropped(Exception):
    """The length policy drops this record; the message is the reason."""


class MaskedText(NamedTuple):
    """Token ids of prompt and response, and a response mask."""

    ids: list[int]
    is_response: list[bool]

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def start(self) -> int:
        """Index of the first token of the last response; the number of tokens if there is none."""
        start = len(self.ids)
        while start and self.is_response[start - 1]:
            start -= 1
        return start


def fit(
    prompt: Prompt, segments_of: Callable[[Prompt], Sequence[Sequence[Segment]]], encoder: SegmentEncoder,
    max_length: int, overlong: str, keep_end: bool = False,
) -> tuple[list[MaskedText], bool]:  # fmt: skip
    """Encode the responses to one prompt, with at most `max_length` tokens each. Returns whether any was cut.

    segments_of: returns the segments of each response for a (shortened) prompt. All responses keep the same
    part of the prompt. overlong:
    - truncate_prompt: remove the oldest messages, then tokens from the left, but never BOS or all tokens.
    - truncate_response: remove tokens from the right; `keep_end` keeps the last token, EOS.
    - drop: raise Dropped. The other policies raise it too, if no response is left.
    - error: raise ValueError.
    """
    rows = [MaskedText(*encoder.encode(segments)) for segments in segments_of(prompt)]
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
        raise Dropped("identical after truncation")
    return cut, True


def fit_demonstration(
    record: dict[str, Any], encoder: SegmentEncoder, max_length: int, overlong: str, keep_end: bool = False
) -> tuple[MaskedText, bool]:
    """Apply `fit` to a demonstration, whose last reply is the response.

    keep_end: the text is for scoring, so it ends in EOS even if it was truncated, as in step 3.
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


def _cut_response(row: MaskedText, max_length: int, keep_end: bool) -> MaskedText:
    if row.start >= max_length - keep_end:
        raise Dropped("prompt too long")
    if len(row.ids) <= max_length:
        return row
    end = max_length - keep_end
    return MaskedText(*(part[:end] + part[-1:] * keep_end for part in row))


def _cut_prompt(
    rows: list[MaskedText], prompt: Prompt, segments_of: Callable[[Prompt], Sequence[Sequence[Segment]]],
    encoder: SegmentEncoder, max_length: int,
) -> list[MaskedText]:  # fmt: skip
    for shorter in _without_oldest(prompt):
        rows = [MaskedText(*encoder.encode(segments)) for segments in segments_of(shorter)]
        if max(len(row.ids) for row in rows) <= max_length:
            return rows
    bos = len(encoder.bos)
    excess = max(len(row.ids) for row in rows) - max_length
    if excess >= min(row.start for row in rows) - bos:
        raise Dropped("response too long")
    return [MaskedText(*(part[:bos] + part[bos + excess :] for part in row)) for row in rows]


def _without_oldest(prompt: Prompt) -> Iterator[list[Message]]:
    """Yield the conversation without its first user turn, its first two, ...; the system message stays."""
    if isinstance(prompt, str):
        return
    system = [message for message in prompt[:1] if message["role"] == "system"]
    questions = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    for index in questions[1:]:
        yield system + prompt[index:]

"""Prompts as token ids."""

import json
from typing import Any, NamedTuple

from common.text.record_formats import Record
from common.text.segments import find_prompt, prompt_segments
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import fit


class Prompt(NamedTuple):
    """Token ids of a prompt, and its record as JSON for reward functions and other tokenizers."""

    ids: list[int]
    json: str

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def record(self) -> dict[str, Any]:
        return json.loads(self.json)


def tokenize_prompt(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str
) -> tuple[Prompt, bool]:
    """Tokenise a prompt. Returns whether it was truncated (see `fit`). Raises Dropped or ValueError."""
    messages = find_prompt(record)
    if isinstance(messages, list) and not any(message["role"] == "user" for message in messages):
        raise ValueError("the prompt has no user message, so there is nothing to answer")
    eos = encoder.tokenizer.eos_token
    (row,), is_cut = fit(
        messages, lambda part: [prompt_segments(part, encoder.render, eos)], encoder, max_length, overlong
    )
    return Prompt(row.ids, json.dumps(record, default=str)), is_cut

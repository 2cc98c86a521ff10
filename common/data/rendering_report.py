"""Lines at the start of a run: how prompts became text, with an example from each source."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.data.cache import Prepared
from common.runtime.distributed import log
from common.text.chat_template import TODAY
from common.text.tokenizer import SegmentEncoder

MOST_EXAMPLES = 5
SHOWN = 200  # characters of an example


class Rendered(NamedTuple):
    """What is used of a source."""

    name: str
    is_string: np.ndarray  # whether the prompt of a row is a string, (N,)
    first: Any  # the first row


def rendered(source: Prepared, places: np.ndarray) -> Iterator[Rendered]:
    """The rows of a source that are used, each once, however often it is seen; nothing where none is."""
    if len(places):
        is_string = source.notes.column("is_string")[np.unique(places)]
        yield Rendered(source.name, is_string, source.rows[np.min(places)])


def describe_rendering(sources: Sequence[Rendered], encoder: SegmentEncoder, learns_replies: bool) -> None:
    """Print per source how many prompts went through which chat template, and the text of its first row.

    Warn where strings, which are used verbatim, meet a model with a chat template. learns_replies: all
    replies of a conversation are learnt, where the template allows that.
    """
    template = encoder.chat_template
    if template is None:
        return
    model = encoder.tokenizer.name_or_path
    name = "the default Human/Assistant template" if template.is_default else f"the chat template of {model}"
    conversations = strings = 0
    for number, source in enumerate(sources):
        messages, verbatim = int((~source.is_string).sum()), int(source.is_string.sum())
        conversations, strings = conversations + messages, strings + verbatim
        parts = [f"{messages:,} prompts rendered with {name}"] * (messages > 0)
        parts += [f"{verbatim:,} prompts used verbatim"] * (verbatim > 0)
        if number < MOST_EXAMPLES:
            parts[-1] += f"; the first row: {example(source.first, encoder)}"
        log(f"{source.name}: {', '.join(parts)}")
    if strings and not template.is_default:
        log(
            f"warning: {strings:,} prompts are strings, so {name} is not used for them; write prompts as"
            " messages to use it"
        )
    if conversations and template.has_date:
        log(f"{name} writes today's date: in every run it is {TODAY:%d %b %Y}")
    if conversations and learns_replies and template.changes_replies(encoder.tokenizer.eos_token):
        log(f"{name} changes earlier replies of a conversation: only its last reply is learnt")


def example(row: Any, encoder: SegmentEncoder) -> str:
    """The text of a row with its special tokens, on one line; a long one without its middle."""
    ids = getattr(row, "chosen_ids", None) or row.ids
    text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
    return repr(text)

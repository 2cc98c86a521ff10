"""Log how prompts were rendered, with an example from each source."""

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
    """The rows in use of a source."""

    name: str
    is_string: np.ndarray  # whether the prompt of a row is a string, (N,)
    first: Any  # the first row


def rendered(source: Prepared, indices: np.ndarray) -> Iterator[Rendered]:
    """Yield the rows in use of a source, without repetitions; yields nothing if no row is used."""
    if len(indices):
        is_string = source.notes.column("is_string")[np.unique(indices)]
        yield Rendered(source.name, is_string, source.rows[np.min(indices)])


def log_rendering(sources: Sequence[Rendered], encoder: SegmentEncoder, trains_on_replies: bool) -> None:
    """Log for each source how its prompts were rendered, and the text of its first row.

    Warns of string prompts, which are used verbatim, for a model with a chat template. trains_on_replies:
    all replies of a conversation are trained on, if the template allows it.
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
            f"warning: {strings:,} prompts are strings, so {name} is not applied; write prompts as messages"
            " to apply it"
        )
    if conversations and template.has_date:
        log(f"{name} writes today's date; every run uses {TODAY:%d %b %Y} instead")
    if conversations and trains_on_replies and template.changes_replies(encoder.tokenizer.eos_token):
        log(f"{name} changes earlier replies of a conversation: training uses only the last reply")


def example(row: Any, encoder: SegmentEncoder) -> str:
    """Text of a row with special tokens, on one line; long texts lose their middle."""
    ids = getattr(row, "chosen_ids", None) or row.ids
    text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
    return repr(text)

"""Lines at the start of a run: how prompts became text, with an example from each source."""

from collections.abc import Sequence
from typing import Any

from common.chat_template import TODAY
from common.distributed import log
from common.prepare import Prepared
from common.tokenization import SegmentEncoder

MOST_SOURCES = 5
SHOWN = 200  # characters of an example


def describe_rendering(sources: Sequence[Prepared], encoder: SegmentEncoder, learns_replies: bool) -> None:
    """Print per source how many prompts went through which chat template, and the text of its first row.

    Warn where strings, which are used verbatim, meet a model with a chat template. learns_replies: all
    replies of a conversation are learnt, where the template allows that.
    """
    template = encoder.chat_template
    model = encoder.tokenizer.name_or_path
    name = "the default Human/Assistant template" if template.is_default else f"the chat template of {model}"
    rendered = 0
    for source in [source for source in sources if source.read][:MOST_SOURCES]:
        strings = source.notes.column("is_string")
        if not len(strings):
            continue
        messages, verbatim = int((~strings).sum()), int(strings.sum())
        rendered += messages
        parts = [f"{messages:,} prompts rendered with {name}"] * (messages > 0)
        parts += [f"{verbatim:,} prompts used verbatim"] * (verbatim > 0)
        log(f"{source.name}: {', '.join(parts)}; the first row: {example(source.rows[0], encoder)}")
        if verbatim and not template.is_default:
            log(
                f"warning: {source.name}: {verbatim:,} prompts are strings, so {name} is not used for them;"
                " write prompts as messages to use it"
            )
    if len(sources) > MOST_SOURCES:
        log(f"... and {len(sources) - MOST_SOURCES} more files")
    if rendered and template.has_date:
        log(f"{name} writes today's date: in every run it is {TODAY:%d %b %Y}")
    if rendered and learns_replies and template.changes_replies(encoder.tokenizer.eos_token):
        log(f"{name} changes earlier replies of a conversation: only its last reply is learnt")


def example(row: Any, encoder: SegmentEncoder) -> str:
    """The text of a row with its special tokens, on one line; a long one without its middle."""
    ids = getattr(row, "chosen_ids", None) or row.ids
    text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
    return repr(text)

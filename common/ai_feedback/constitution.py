"""Build questions for AI feedback from a constitution and templates, as conversations.

Both are files that users edit; templates/ holds the defaults.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from common.ai_feedback.options import ConstitutionOptions
from common.data.records import fraction
from common.runtime.options import UserError
from common.text.conversation import Message
from common.text.tokenizer import SegmentEncoder, load_tokenizer

SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


def load_assistant(options: ConstitutionOptions) -> SegmentEncoder:
    """Load the encoder of a chat model. Raises UserError if its tokenizer has no chat template."""
    path = options.model_name_or_path
    if options.default_chat_template:
        return SegmentEncoder(load_tokenizer(path))
    tokenizer = load_tokenizer(path, default_template="")
    if not tokenizer.chat_template:
        raise UserError(
            f"--model_name_or_path {path}: its tokenizer has no chat template, so it cannot answer questions;"
            " use an instruction-tuned model, or add --default_chat_template"
        )
    return SegmentEncoder(tokenizer)


def read_constitution(path: str) -> list[str]:
    """Read principles from a YAML list, or from a text file with one per line and # for comments.

    Raises UserError naming the file and the bad principle.
    """
    text = _read("constitution", path)
    principles = [line.strip() for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    if Path(path).suffix in (".yaml", ".yml"):
        try:
            principles = yaml.safe_load(text) or []
        except Exception as error:  # noqa: BLE001 - yaml raises more than its own errors, as for a date
            raise UserError(
                f"--constitution {path}: not valid YAML: {' '.join(str(error).split())}"
            ) from None
    if not isinstance(principles, list):
        raise UserError(
            f"--constitution {path}: must be a list of principles, not {type(principles).__name__}"
        )
    for number, principle in enumerate(principles, start=1):
        if not isinstance(principle, str) or not principle.strip():
            raise UserError(
                f"--constitution {path}: principle {number} is {principle!r}; it must be text"
                " (put a principle with a colon in quotes)"
            )
    if not principles:
        raise UserError(f"--constitution {path}: has no principles; at least one is needed")
    return [principle.strip() for principle in principles]


def read_template(option: str, path: str, placeholders: Sequence[str]) -> str:
    """Read a template. Raises UserError naming option, file and a missing placeholder."""
    text = _read(option, path).strip()
    for placeholder in placeholders:
        if f"{{{placeholder}}}" not in text:
            required = " ".join(f"{{{name}}}" for name in placeholders)
            raise UserError(f"--{option} {path}: lacks {{{placeholder}}}; it must have {required}")
    return text


def fill(template: str, **texts: str) -> list[Message]:
    """Fill the placeholders of a template; returns a user message. Braces within the texts stay."""
    names = "|".join(texts)
    content = re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], template)
    return [{"role": "user", "content": content}]


def draw_principle(principles: Sequence[str], content: str | list[Message], seed: int, round: int = 0) -> str:
    """Draw a principle, a function of the judged content, the seed and the round."""
    return principles[int(fraction(content, f"principle {seed} {round}") * len(principles))]


def as_text(part: str | list[Message]) -> str:
    """Format a prompt or response as text within a question: speaker names, except for a single reply."""
    if isinstance(part, str):
        return part.strip()
    if [message["role"] for message in part] == ["assistant"]:
        return part[0]["content"].strip()
    return "\n\n".join(f"{SPEAKERS[turn['role']]}: {turn['content'].strip()}" for turn in part)


def _read(option: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--{option} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--{option} {path}: not UTF-8 text: {error.reason}") from None

"""What a model is asked by: a constitution, templates, and a chat template to be asked in. All but the last
are files that users edit; those in templates/ are the defaults.
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
    """The encoder of a model that can be asked. Raises UserError for one that was never taught to answer."""
    path = options.model_name_or_path
    if options.default_chat_template:
        return SegmentEncoder(load_tokenizer(path))
    tokenizer = load_tokenizer(path, default_template="")
    if not tokenizer.chat_template:
        raise UserError(
            f"--model_name_or_path {path}: its tokenizer has no chat template, so it cannot be asked as an"
            " assistant; take a model that was taught to answer, or add --default_chat_template"
        )
    return SegmentEncoder(tokenizer)


def read_constitution(path: str) -> list[str]:
    """The principles of a YAML list, or of a text file: a line each, but for those that begin with #.

    Raises UserError naming the file, and the principle that is none.
    """
    text = _read("constitution", path)
    found = [line.strip() for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    if Path(path).suffix in (".yaml", ".yml"):
        try:
            found = yaml.safe_load(text) or []
        except yaml.YAMLError as error:
            raise UserError(
                f"--constitution {path}: not valid YAML: {' '.join(str(error).split())}"
            ) from None
    if not isinstance(found, list):
        raise UserError(f"--constitution {path}: must be a list of principles, not {type(found).__name__}")
    for number, principle in enumerate(found, start=1):
        if not isinstance(principle, str) or not principle.strip():
            raise UserError(
                f"--constitution {path}: principle {number} is {principle!r}; it must be text"
                " (one with a colon stands in quotes)"
            )
    if not found:
        raise UserError(f"--constitution {path}: has no principles; one is drawn for each question")
    return [principle.strip() for principle in found]


def read_template(option: str, path: str, places: Sequence[str]) -> str:
    """A template that has all the places. Raises UserError naming option, file and a place it lacks."""
    text = _read(option, path).strip()
    for place in places:
        if f"{{{place}}}" not in text:
            wanted = " ".join(f"{{{name}}}" for name in places)
            raise UserError(f"--{option} {path}: lacks {{{place}}}; it must have {wanted}")
    return text


def fill(template: str, **texts: str) -> list[Message]:
    """The template with a text in each place, as a question. Braces within the texts are left alone."""
    places = "|".join(texts)
    content = re.sub(rf"\{{({places})\}}", lambda place: texts[place[1]], template)
    return [{"role": "user", "content": content}]


def draw_principle(principles: Sequence[str], content: str | list[Message], seed: int, round: int = 0) -> str:
    """A principle by what is judged, the seed and the round, and nothing else."""
    return principles[int(fraction(content, f"principle {seed} {round}") * len(principles))]


def as_text(part: str | list[Message]) -> str:
    """A prompt or response as a model reads it within a question: who says what, but for a lone reply."""
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

"""Split a record into prompt and responses. Pure."""

from collections.abc import Sequence
from typing import Any
from unicodedata import east_asian_width

from common.text.conversation import Message, common_length, plain_messages, without_last_replies

Text = str | list[Message]


def text_field(record: dict[str, Any], name: str) -> Text:
    """Read a field as a non-empty string or a list of plain messages. Raises ValueError."""
    value = record[name]
    if not isinstance(value, str | list):
        raise ValueError(
            f"field {name!r} is {type(value).__name__}; it must be a string or a list of messages"
        )
    if not value or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"field {name!r} is empty")
    return value if isinstance(value, str) else plain_messages(value, name)


def split_responses(record: dict[str, Any], names: Sequence[str]) -> tuple[Text, dict[str, Text]]:
    """Split a record into its prompt and the responses in the fields `names`.

    Responses that are dialogues, with the prompt included, lose the prompt. Assistant messages at the end of
    the prompt move to the responses.
    """
    responses = {name: text_field(record, name) for name in names}
    if "prompt" in record:
        prompt, responses = _without_prompt(text_field(record, "prompt"), responses)
    else:
        prompt, responses = _common_beginning(responses)
    for name, response in responses.items():
        if isinstance(response, list) and (not response or response[-1]["role"] != "assistant"):
            raise ValueError(f"field {name!r} must end with an assistant message")
    return prompt, responses


def is_answer(response: Any) -> bool:
    """Whether a response is only an answer, not a dialogue with its prompt. Accepts unchecked messages."""
    is_list = isinstance(response, list) and response and isinstance(response[0], dict)
    return isinstance(response, str) or bool(is_list and response[0].get("role") == "assistant")


def name_responses(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Name the elements of `responses` as fields, and list the response fields that are messages."""
    several = record.get("responses")
    several = several if isinstance(several, list) else []
    record = {**record, **{f"responses[{number}]": response for number, response in enumerate(several)}}
    names = ("completion", "chosen", "rejected", *(f"responses[{number}]" for number in range(len(several))))
    return record, [name for name in names if isinstance(record.get(name), list)]


def _without_prompt(prompt: Text, responses: dict[str, Text]) -> tuple[Text, dict[str, Text]]:
    """Remove the prompt from responses that are dialogues, and the last replies from the prompt."""
    names = [name for name, response in responses.items() if isinstance(response, list)]
    dialogues = [responses[name] for name in names] if len(names) == len(responses) else []
    if isinstance(prompt, str):
        if not names:
            return prompt, responses
        if not dialogues:
            raise ValueError(
                f"'prompt' is a string but {names[0]!r} is a list of messages; make both one kind"
            )
        if any(dialogue[0]["role"] != "assistant" for dialogue in dialogues):
            if all(_asks(dialogue, prompt) for dialogue in dialogues):
                return _common_beginning(responses)
            raise ValueError(
                f"'prompt' is not one of the user messages in {' and '.join(map(repr, responses))}"
            )
        prompt = [{"role": "user", "content": prompt}]
    responses = {
        name: response[len(prompt) :] if response[: len(prompt)] == prompt else response
        for name, response in responses.items()
    }
    allowed = ("user", "assistant") if prompt[-1]["role"] == "assistant" else ("assistant",)
    for name, response in responses.items():
        if isinstance(response, list) and response and response[0]["role"] not in allowed:
            raise ValueError(f"field {name!r} is a dialogue that does not begin with 'prompt'")
    shorter = without_last_replies(prompt)
    if not shorter:
        raise ValueError("field 'prompt' has no user or system message to answer")
    if last_replies := prompt[len(shorter) :]:
        for name, response in responses.items():
            if isinstance(response, str) or (response and response[0]["role"] == "assistant"):
                raise ValueError(
                    f"field 'prompt' ends with an assistant message, so {name!r} cannot answer it"
                )
        responses = {name: [*last_replies, *response] for name, response in responses.items()}
    return shorter, responses


def _asks(dialogue: list[Message], prompt: str) -> bool:
    return any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in dialogue)


def _common_beginning(dialogues: dict[str, Text]) -> tuple[Text, dict[str, Text]]:
    """Split dialogues into their common prompt and the responses, at a message or at a word."""
    first, *others = dialogues.values()
    names = " and ".join(map(repr, dialogues))
    if any(type(other) is not type(first) for other in others):
        raise ValueError(f"{names} must both be strings or both be lists of messages")
    if others and all(other == first for other in others):
        raise ValueError(f"{names} are identical")
    cut = common_length([first, *others])
    if isinstance(first, str):
        cut = min(_word_start(text, cut) for text in dialogues.values())
    else:
        cut = len(without_last_replies(first[:cut]))
    prompt = first[:cut]
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(f"{names} have no common beginning to use as the prompt")
    return prompt, {name: dialogue[cut:] for name, dialogue in dialogues.items()}


def _word_start(text: str, cut: int) -> int:
    """Move `cut` back to the start of a word, so that no word is cut and the rest is not empty.

    A word includes the space before it. In scripts without spaces each character is a word.
    """
    nothing_left = not text[cut:].strip()
    if nothing_left:
        cut = len(text[:cut].rstrip())
    if cut and nothing_left and _is_wide(text[cut - 1]):
        cut -= 1
    elif nothing_left or not text[cut].isspace():
        while cut and not text[cut - 1].isspace() and not _is_wide(text[cut - 1]):
            cut -= 1
    return cut - 1 if cut and text[cut - 1] == " " else cut


def _is_wide(character: str) -> bool:
    return east_asian_width(character) in "WF"

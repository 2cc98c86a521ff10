"""The system message that a record has beside its dialogue, put in front of it. Pure."""

from typing import Any

from common.text.fields import is_nothing
from common.text.prompt_boundary import is_answer

Record = dict[str, Any]

SYSTEM = ("system", "system_prompt")
RESPONSES = ("completion", "chosen", "rejected")


def with_system(record: Record) -> Record:
    """The record with the text of `system` as its first message. Raises ValueError where it has no place."""
    name = next((name for name in SYSTEM if not is_nothing(record.get(name))), "")
    if not name:
        return record
    text = record[name]
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is {type(text).__name__}; it must be a string")
    first = {"role": "system", "content": text}
    several = record.get("responses")
    several = several if isinstance(several, list) else []
    responses = [*(record[place] for place in RESPONSES if place in record), *several]
    prompt = record.get("prompt")
    if isinstance(prompt, str) and responses and all(_is_reply(response) for response in responses):
        prompt = [{"role": "user", "content": prompt}]
        record = {**record, "prompt": prompt}
    is_found = any(isinstance(record.get(place), list) for place in ("prompt", "messages"))
    if not is_found and not any(_is_whole(response, prompt) for response in responses):
        raise ValueError(
            f"field {name!r} has no place before a prompt that is a string, which is used verbatim; write"
            " the prompt as a list of messages"
        )
    found = {}
    for place in ("prompt", "messages"):
        if isinstance(record.get(place), list):
            found[place] = _begun(record[place], first, name, place)
    for place in RESPONSES:
        if _is_whole(record.get(place), prompt):
            found[place] = _begun(record[place], first, name, place)
    if several:
        found["responses"] = [
            _begun(response, first, name, f"responses[{number}]") if _is_whole(response, prompt) else response
            for number, response in enumerate(several)
        ]
    return {**record, **found}


def _begun(messages: list[Any], first: dict[str, str], name: str, place: str) -> list[Any]:
    """Messages that begin with the system message `first`."""
    begin = next(iter(messages), None)
    if begin == first:
        return messages
    if _is_system(begin):
        raise ValueError(f"field {name!r} and the first of {place!r} are two different system messages")
    return [first, *messages]


def _is_whole(response: Any, prompt: Any) -> bool:
    """Whether a response is a dialogue that repeats the prompt, perhaps without its system message."""
    if not isinstance(response, list) or not response or is_answer(response):
        return False
    if not isinstance(prompt, list):
        return True
    asked = prompt[1:] if prompt and _is_system(prompt[0]) else prompt
    given = response[1:] if _is_system(response[0]) else response
    return given[: len(asked)] == asked


def _is_reply(response: Any) -> bool:
    return isinstance(response, list) and is_answer(response)


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "system"

"""Move the `system` field of a record into its messages. Pure."""

from typing import Any

from common.text.fields import is_empty
from common.text.prompt_boundary import is_answer

Record = dict[str, Any]

SYSTEM = ("system", "system_prompt")
RESPONSES = ("completion", "chosen", "rejected")


def insert_system(record: Record) -> Record:
    """Insert `system` as the first message. Raises ValueError if the record has no messages."""
    name = next((name for name in SYSTEM if not is_empty(record.get(name))), "")
    if not name:
        return record
    text = record[name]
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is {type(text).__name__}; it must be a string")
    first = {"role": "system", "content": text}
    several = record.get("responses")
    several = several if isinstance(several, list) else []
    responses = [*(record[field] for field in RESPONSES if field in record), *several]
    prompt = record.get("prompt")
    if isinstance(prompt, str) and responses and all(_is_reply(response) for response in responses):
        prompt = [{"role": "user", "content": prompt}]
        record = {**record, "prompt": prompt}
    has_messages = any(isinstance(record.get(field), list) for field in ("prompt", "messages"))
    if not has_messages and not any(_is_dialogue(response, prompt) for response in responses):
        raise ValueError(
            f"field {name!r} cannot be used with a prompt that is a string (used verbatim); write the prompt"
            " as a list of messages"
        )
    changed = {}
    for field in ("prompt", "messages"):
        if isinstance(record.get(field), list):
            changed[field] = _insert_first(record[field], first, name, field)
    for field in RESPONSES:
        if _is_dialogue(record.get(field), prompt):
            changed[field] = _insert_first(record[field], first, name, field)
    if several:
        changed["responses"] = [
            _insert_first(response, first, name, f"responses[{number}]")
            if _is_dialogue(response, prompt)
            else response
            for number, response in enumerate(several)
        ]
    return {**record, **changed}


def _insert_first(messages: list[Any], first: dict[str, str], name: str, field: str) -> list[Any]:
    """Insert the system message `first`, unless the messages begin with it."""
    begin = next(iter(messages), None)
    if begin == first:
        return messages
    if _is_system(begin):
        raise ValueError(f"field {name!r} differs from the system message in {field!r}")
    return [first, *messages]


def _is_dialogue(response: Any, prompt: Any) -> bool:
    """Whether a response is a dialogue that repeats the prompt, with or without its system message."""
    if not isinstance(response, list) or not response or is_answer(response):
        return False
    if not isinstance(prompt, list):
        return True
    asked = prompt[1:] if prompt and _is_system(prompt[0]) else prompt
    dialogue = response[1:] if _is_system(response[0]) else response
    return dialogue[: len(asked)] == asked


def _is_reply(response: Any) -> bool:
    return isinstance(response, list) and is_answer(response)


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "system"

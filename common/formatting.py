"""From a record to the text of its prompt and response. Pure: no tokenizer, no files.

A text field is a string, used verbatim, or a list of {"role", "content"} messages, rendered by the chat
template. Both become a list of segments: stretches of context and of response, in order. All stages tokenise
segment by segment, so the boundary between prompt and response tokens is the same in all of them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # (messages, add_generation_prompt) -> text

# Used when a tokenizer brings no chat template, and saved with it. Each reply ends in EOS.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\n\nAssistant: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


class Segment(NamedTuple):
    """A stretch of text; `is_response`: the model is to produce it; `ends`: EOS follows it."""

    text: str
    is_response: bool = False
    ends: bool = False


class Comparison(NamedTuple):
    """Two or more responses to a prompt, by field name, and their ranks: lower is better, equal is a tie."""

    prompt: str | list[Message]
    responses: dict[str, str | list[Message]]
    ranks: list[float]


def find_prompt(record: dict[str, Any]) -> str | list[Message]:
    """The prompt of any kind of record. Raises ValueError, in words for the user, when there is none."""
    if "prompt" in record:
        return _text(record, "prompt")
    if "messages" in record:
        messages = _messages(record)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise ValueError("field 'messages' has nothing before the assistant's message")
        return messages
    if "chosen" in record and "rejected" in record:
        return _common_prompt(record)[0]
    raise ValueError("field 'prompt' is missing (or 'messages', or 'chosen' and 'rejected')")


def prompt_segments(prompt: str | list[Message], render: Render, eos: str) -> list[Segment]:
    """A prompt as segments, up to where the response begins."""
    return [Segment(prompt)] if isinstance(prompt, str) else _conversation(prompt, render, eos)


def demonstration_segments(record: dict[str, Any], render: Render, eos: str) -> list[Segment]:
    """Segments of `prompt` + `completion`, or of `messages` with every assistant turn as a response.

    A completion whose record says that it has not `ended` was cut, and EOS is not what comes next. Raises
    ValueError, in words for the user.
    """
    if "messages" in record:
        return _conversation(until_last_reply(record)["messages"], render, eos)
    if "prompt" not in record or "completion" not in record:
        missing = "prompt" if "prompt" not in record else "completion"
        raise ValueError(
            f"field {missing!r} is missing (a demonstration has 'prompt' + 'completion', or 'messages')"
        )
    ended = has_ended(record, "ended")
    segments = dialogue_segments(_text(record, "prompt"), _text(record, "completion"), render, eos)
    return [*segments[:-1], segments[-1]._replace(ends=ended)]


def until_last_reply(record: dict[str, Any]) -> dict[str, Any]:
    """A demonstration without the messages that no reply follows. Raises ValueError when there is none."""
    if "messages" not in record:
        return record
    messages = _messages(record)
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        raise ValueError("field 'messages' has no assistant message to learn from")
    return {**record, "messages": messages[: replies[-1] + 1]}


def has_ended(record: dict[str, Any], name: str) -> bool:
    """The flag of a response: false when it was cut, so that EOS is not its next token. Default: true."""
    ended = record.get(name, True)
    if not isinstance(ended, bool):
        raise ValueError(f"field {name!r} is {ended!r}; it must be true or false")
    return ended


def comparison(record: dict[str, Any]) -> Comparison:
    """What a preference compares: all of `responses`, or `chosen` and `rejected`.

    Without `prompt`, the common prefix of these two is the prompt. Raises ValueError, in words for the user,
    for a record that compares nothing.
    """
    if "responses" in record or "ranks" in record:
        return _ranking(record)
    for name in ("chosen", "rejected"):
        if name not in record:
            raise ValueError(
                f"field {name!r} is missing (a preference has 'prompt' + 'chosen' + 'rejected',"
                " or 'prompt' + 'responses' + 'ranks')"
            )
    if "prompt" in record:
        prompt, chosen, rejected = (_text(record, name) for name in ("prompt", "chosen", "rejected"))
    else:
        prompt, chosen, rejected = _common_prompt(record)
    ranks = [0.0, 0.0 if record.get("tie") else 1.0]
    return Comparison(prompt, {"chosen": chosen, "rejected": rejected}, ranks)


def preference_segments(compared: Comparison, render: Render, eos: str) -> list[list[Segment]]:
    """Segments of the dialogue with each response."""
    prompt, responses, _ = compared
    return [dialogue_segments(prompt, response, render, eos, name) for name, response in responses.items()]


def dialogue_segments(
    prompt: str | list[Message],
    response: str | list[Message],
    render: Render,
    eos: str,
    name: str = "completion",
) -> list[Segment]:
    """Prompt segments, then the response, whose last assistant turn alone is marked as one.

    name: the field the response comes from, for messages.
    """
    if isinstance(prompt, str) and isinstance(response, str):
        return [Segment(prompt), Segment(response, is_response=True, ends=True)]
    if isinstance(prompt, str):
        raise ValueError(f"'prompt' is a string but {name!r} is a list of messages; both must be of one kind")
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    if response[-1]["role"] != "assistant":
        raise ValueError(f"field {name!r} must end with an assistant message")
    segments = _conversation(prompt + response, render, eos)
    return [s._replace(is_response=False) for s in segments[:-1]] + segments[-1:]


def _ranking(record: dict[str, Any]) -> Comparison:
    for name in ("prompt", "responses", "ranks"):
        if name not in record:
            raise ValueError(f"field {name!r} is missing (a ranking has 'prompt' + 'responses' + 'ranks')")
    responses, ranks = record["responses"], record["ranks"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError("field 'responses' must be a list of two responses or more")
    if not isinstance(ranks, list) or len(ranks) != len(responses):
        raise ValueError(f"field 'ranks' must be a list of {len(responses)} numbers, one per response")
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
            raise ValueError(f"field 'ranks': {rank!r} is not a number (the lowest is the best)")
    if len(set(ranks)) == 1:
        raise ValueError("field 'ranks': all are equal, so no response is better than another")
    by_name = {f"responses[{number}]": response for number, response in enumerate(responses)}
    return Comparison(_text(record, "prompt"), {name: _text(by_name, name) for name in by_name}, ranks)


def _text(record: dict[str, Any], name: str) -> str | list[Message]:
    """The field as a non-empty string or list of well-formed messages, else ValueError."""
    value = record[name]
    if not isinstance(value, str | list):
        raise ValueError(
            f"field {name!r} is {type(value).__name__}; it must be a string or a list of messages"
        )
    if not value or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"field {name!r} is empty")
    if isinstance(value, str):
        return value
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"field {name!r}: message {number} must be an object with 'role' and 'content'")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(
                f"field {name!r}: message {number} has role {message['role']!r};"
                " allowed: system, user, assistant"
            )
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError(f"field {name!r}: message {number} has no content")
    return value


def _messages(record: dict[str, Any]) -> list[Message]:
    messages = _text(record, "messages")
    if isinstance(messages, str):
        raise ValueError("field 'messages' is a string; it must be a list of messages")
    return messages


def _conversation(messages: list[Message], render: Render, eos: str) -> list[Segment]:
    """Segments of a conversation, with the generation prompt unless the last message is a reply."""
    if messages[0]["role"] == "assistant":
        raise ValueError("the conversation begins with the assistant; another message must come first")
    segments: list[Segment] = []
    done = ""  # what has been cut into segments already; every further rendering must start with it
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        context = render(messages[:number], True)
        whole = render(messages[: number + 1], False)
        if not context.startswith(done) or not whole.startswith(context):
            raise ValueError(
                "the chat template does not render a conversation as the beginning of its continuation"
            )
        reply, found_eos, _ = whole[len(context) :].partition(eos)
        is_last = number == len(messages) - 1
        segments.append(Segment(context[len(done) :]))
        segments.append(Segment(reply, is_response=True, ends=bool(found_eos) or is_last))
        done = context + reply + found_eos
    if messages[-1]["role"] != "assistant":
        context = render(messages, True)
        if not context.startswith(done):
            raise ValueError(
                "the chat template does not render a conversation as the beginning of its continuation"
            )
        segments.append(Segment(context[len(done) :]))
    return segments


def _common_prompt(record: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of two whole dialogues, split where they begin to differ."""
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    if type(chosen) is not type(rejected):
        raise ValueError("'chosen' and 'rejected' must both be strings or both be lists of messages")
    cut = 0
    while cut < min(len(chosen), len(rejected)) and chosen[cut] == rejected[cut]:
        cut += 1
    if isinstance(chosen, str) and cut and chosen[cut - 1] == " ":
        cut -= 1  # the space belongs to the word that follows
    prompt = chosen[:cut]
    if not prompt:
        raise ValueError("'chosen' and 'rejected' have no common beginning to serve as the prompt")
    if cut in (len(chosen), len(rejected)):
        raise ValueError("'chosen' and 'rejected' do not differ in a response")
    return prompt, chosen[cut:], rejected[cut:]

"""Convert a record to text segments of prompt and response. Pure: no tokenizer, no files.

A text field is a string, used verbatim, or a list of {"role", "content"} messages, rendered by the chat
template. Both become a list of segments: pieces of context and of response, in order. All stages tokenise
each segment separately, so they agree on the boundary between prompt and response tokens.
"""

from typing import Any, NamedTuple

from common.text.conversation import Message, Render, Segment, conversation_segments, without_last_replies
from common.text.fields import as_number, flag, shown
from common.text.prompt_boundary import Text, name_responses, split_responses, text_field


class Comparison(NamedTuple):
    """Responses to a prompt, by field name, and their ranks: lower is better, equal ranks are a tie."""

    prompt: Text
    responses: dict[str, Text]
    ranks: list[float]


def find_prompt(record: dict[str, Any]) -> Text:
    """Extract the prompt of any kind of record; messages end before the last reply.

    Raises ValueError with a message for the user if there is no prompt.
    """
    if "messages" in record:
        prompt = without_last_replies(_messages(record))
        if not prompt:
            raise ValueError("field 'messages' has nothing before the assistant's message")
        return prompt
    if isinstance(record.get("prompt"), str):
        return split_responses(*name_responses(record))[0]
    if "prompt" in record:
        return split_responses(record, [])[0]
    if "chosen" in record and "rejected" in record:
        return split_responses(record, ["chosen", "rejected"])[0]
    raise ValueError("field 'prompt' is missing (or 'messages', or 'chosen' and 'rejected')")


def prompt_segments(prompt: Text, render: Render, eos: str) -> list[Segment]:
    """Segments of a prompt, generation prompt included."""
    if isinstance(prompt, str):
        return [Segment(prompt)]
    segments = conversation_segments(prompt, render, eos)
    return [segment._replace(is_response=False) for segment in segments]


def demonstration_segments(record: dict[str, Any], render: Render, eos: str) -> list[Segment]:
    """Segments of `prompt` + `completion`, or of `messages` with every assistant turn as a response.

    `"ended": false` marks a truncated completion: EOS does not follow it. Raises ValueError with a message
    for the user.
    """
    record = plain_demonstration(record)
    if "messages" in record:
        return conversation_segments(record["messages"], render, eos)
    ended = has_ended(record, "ended")
    segments = dialogue_segments(record["prompt"], record["completion"], render, eos)
    return [*segments[:-1], segments[-1]._replace(ends=ended)]


def plain_demonstration(record: dict[str, Any]) -> dict[str, Any]:
    """Check a demonstration, and remove messages after its last reply. Raises ValueError."""
    if "messages" not in record:
        for name in ("prompt", "completion"):
            if name not in record:
                raise ValueError(
                    f"field {name!r} is missing (a demonstration has 'prompt' + 'completion', or 'messages')"
                )
        prompt, responses = split_responses(record, ["completion"])
        return {**record, "prompt": prompt, **responses}
    messages = _messages(record)
    replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        raise ValueError("field 'messages' has no assistant message to learn from")
    return {**record, "messages": messages[: replies[-1] + 1]}


def has_ended(record: dict[str, Any], name: str) -> bool:
    """Read the flag of a response: false if it was truncated, so that EOS does not follow. Default: true."""
    return flag(record, name, True)


def parse_comparison(record: dict[str, Any]) -> Comparison:
    """Read the compared responses of a preference: `responses`, or `chosen` and `rejected`.

    Without `prompt`, their common beginning is the prompt. Raises ValueError with a message for the user.
    """
    if "responses" in record or "ranks" in record:
        return _ranking(record)
    for name in ("chosen", "rejected"):
        if name not in record:
            raise ValueError(
                f"field {name!r} is missing (a preference has 'prompt' + 'chosen' + 'rejected',"
                " or 'prompt' + 'responses' + 'ranks')"
            )
    prompt, responses = split_responses(record, ["chosen", "rejected"])
    return Comparison(prompt, responses, [0.0, 0.0 if flag(record, "tie", False) else 1.0])


def preference_segments(compared: Comparison, render: Render, eos: str) -> list[list[Segment]]:
    """Segments of prompt and response, for each response."""
    prompt, responses, _ = compared
    return [dialogue_segments(prompt, response, render, eos, name) for name, response in responses.items()]


def dialogue_segments(
    prompt: Text, response: Text, render: Render, eos: str, name: str = "completion"
) -> list[Segment]:
    """Segments of a prompt and a response; only the last assistant turn is a response segment.

    name: field of the response, for error messages.
    """
    if isinstance(prompt, str) and isinstance(response, str):
        return [Segment(prompt), Segment(response, is_response=True, ends=True)]
    if isinstance(prompt, str):
        raise ValueError(f"'prompt' is a string but {name!r} is a list of messages; make both one kind")
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    if not response or response[-1]["role"] != "assistant":
        raise ValueError(f"field {name!r} must end with an assistant message")
    segments = conversation_segments(prompt + response, render, eos)
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
        if isinstance(rank, str) or as_number(rank) is None:
            raise ValueError(f"field 'ranks': {shown(rank)} is not a number (the lowest is the best)")
    ranks = [as_number(rank) for rank in ranks]
    if len(set(ranks)) == 1:
        raise ValueError("field 'ranks': all are equal, so no response is better than another")
    by_name = {f"responses[{number}]": response for number, response in enumerate(responses)}
    prompt, texts = split_responses({"prompt": record["prompt"], **by_name}, [*by_name])
    return Comparison(prompt, texts, ranks)


def _messages(record: dict[str, Any]) -> list[Message]:
    messages = text_field(record, "messages")
    if isinstance(messages, str):
        raise ValueError("field 'messages' is a string; it must be a list of messages")
    return messages

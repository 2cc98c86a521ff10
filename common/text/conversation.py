"""A conversation under a chat template, cut into context and replies. Pure: the template is a function."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # (messages, add_generation_prompt) -> text

ROLES = ("system", "user", "assistant")
PROBE = "\ufdd1"  # a Unicode noncharacter: marks where a template writes a reply

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


def plain_messages(value: list[Any], name: str) -> list[Message]:
    """Messages with a role and a content string each. Raises ValueError, naming the field `name`.

    Content may be a list of text parts, which are joined. Other keys that hold something (tool calls, a
    name, a weight) would change the text or the loss, so they are refused; empty ones are left out, and so
    is a weight that changes nothing: 1 for a reply, 0 for any other message.
    """
    return [_plain_message(message, f"field {name!r}: message {i}") for i, message in enumerate(value)]


def without_last_replies(messages: list[Message]) -> list[Message]:
    """The messages up to the last one that is not the assistant's."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def common_length(items: Sequence[str] | Sequence[list[Any]]) -> int:
    """How many characters, or elements, all items begin with alike."""
    low, high = 0, min(map(len, items))
    while low < high:
        middle = (low + high + 1) // 2
        if all(item[:middle] == items[0][:middle] for item in items):
            low = middle
        else:
            high = middle - 1
    return low


def conversation_segments(messages: list[Message], render: Render, eos: str) -> list[Segment]:
    """Segments whose texts, with `eos` after those that end, are the rendered conversation.

    A conversation that ends with a question ends with the generation prompt. Replies are response segments.
    What a template writes after EOS at the end of a reply is context, or left out after the last reply.

    Templates may render a reply differently once the conversation continues. EOS (Phi-3) or another end token
    (gpt-oss) that they write only after the last reply is not part of an earlier one. An earlier reply that
    they change otherwise (Qwen3 removes `<think>`) is context: the model never produces that text.

    Raises ValueError when the conversation begins with a reply, and when the template renders the last reply
    in a way that cannot follow its generation prompt.
    """
    if messages[0]["role"] == "assistant":
        raise ValueError("the conversation begins with the assistant; another message must come first")
    ends_with_reply = messages[-1]["role"] == "assistant"
    text = render(messages, not ends_with_reply)
    segments: list[Segment] = []
    done = 0  # characters of the text that are in segments
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        is_last = number == len(messages) - 1
        try:
            header, turn = _split_last_reply(messages[: number + 1], render, eos)
        except ValueError:
            if is_last:
                raise
            continue
        reply, found_eos, _ = turn.partition(eos)
        ends = bool(found_eos) and text.startswith(header + reply + eos)
        if len(header) >= done and text.startswith(header + reply):
            segments.append(Segment(text[done : len(header)]))
            segments.append(Segment(reply, is_response=True, ends=ends or is_last))
            done = len(header + reply) + len(eos) * ends
    return segments if ends_with_reply else [*segments, Segment(text[done:])]


def _split_last_reply(messages: list[Message], render: Render, eos: str) -> tuple[str, str]:
    """The rendering of a conversation that ends with a reply, cut where the reply begins.

    That is after the generation prompt. Where the prompt has more than the conversation (DeepSeek opens
    `<think>`), it is after what both have in common.
    """
    text, prompt = render(messages, False), render(messages[:-1], True)
    if text.startswith(prompt):
        return prompt, text[len(prompt) :]
    question = render(messages[:-1], False).removesuffix(eos)
    begin = common_length([prompt, text])
    # The reply itself may begin like the rest of the generation prompt.
    probed = {**messages[-1], "content": PROBE + messages[-1]["content"]}
    reply_begin = render([*messages[:-1], probed], False).find(PROBE)
    begin = min(begin, reply_begin) if reply_begin >= 0 else begin
    if not prompt.startswith(question) or begin < len(question):
        raise ValueError("the chat template renders a conversation differently without its last reply")
    return text[:begin], text[begin:]


def _plain_message(message: Any, place: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{place} must be an object with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{place} has role {role!r}; allowed: {', '.join(ROLES)}")
    for key, value in message.items():
        is_default = key == "weight" and value == (role == "assistant")
        if key not in ("role", "content") and value not in (None, "", [], {}) and not is_default:
            raise ValueError(f"{place} has {key!r}, which is not supported; allowed: 'role' and 'content'")
    if isinstance(content, list):
        content = "".join(_text_of_part(part, place) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{place} has content of type {type(content).__name__}; it must be text")
    if not content.strip() and role != "system":
        raise ValueError(f"{place} has no content")
    return {"role": role, "content": content}


def _text_of_part(part: Any, place: str) -> str:
    """The text of a content part: {"type": "text", "text": ...}, or a string."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, dict) and part.get("type", "text") == "text":
        raise ValueError(f"{place} has a content part of type 'text' whose 'text' is no string")
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"{place} has a content part of type {kind!r}; only text is supported")

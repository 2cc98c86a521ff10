"""Split a rendered conversation into context and response segments. Pure: the template is a function."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]  # (messages, add_generation_prompt) -> text

ROLES = ("system", "user", "assistant")
PROBE = "\ufdd1"  # a Unicode noncharacter: marks the start of a reply

# Used for tokenizers without a chat template, and saved with them. Each reply ends in EOS.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\n\nAssistant: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


class Segment(NamedTuple):
    """A piece of text. `is_response`: the model learns to generate it; `ends`: EOS follows it."""

    text: str
    is_response: bool = False
    ends: bool = False


def plain_messages(value: list[Any], name: str) -> list[Message]:
    """Messages with only a role and a content string. Raises ValueError, naming the field `name`.

    Lists of text parts are joined. Other keys with a value (tool calls, a name, a weight) would change the
    text or the loss and are rejected; empty keys, and default weights (1 for a reply, 0 otherwise), are
    removed.
    """
    return [_plain_message(message, f"field {name!r}: message {i}") for i, message in enumerate(value)]


def without_last_replies(messages: list[Message]) -> list[Message]:
    """Messages without the assistant messages at the end."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def common_length(items: Sequence[str] | Sequence[list[Any]]) -> int:
    """Length of the common prefix of all items, in characters or elements."""
    low, high = 0, min(map(len, items))
    while low < high:
        middle = (low + high + 1) // 2
        if all(item[:middle] == items[0][:middle] for item in items):
            low = middle
        else:
            high = middle - 1
    return low


def conversation_segments(messages: list[Message], render: Render, eos: str) -> list[Segment]:
    """Split the rendered conversation into segments; `eos` follows those that end.

    Replies are response segments. A conversation without a last reply ends with the generation prompt. Text
    that the template writes after a reply's EOS is context; after the last reply it is dropped.

    Templates may render earlier replies differently from the last one. An end token written only after the
    last reply (EOS in Phi-3, another one in gpt-oss) is not part of earlier replies. An earlier reply that
    changes otherwise (Qwen3 removes `<think>`) is context: the model never generates that text.

    Raises ValueError when the conversation begins with a reply, and when the rendered last reply does not
    follow its generation prompt.
    """
    if messages[0]["role"] == "assistant":
        raise ValueError("the conversation begins with the assistant; another message must come first")
    ends_with_reply = messages[-1]["role"] == "assistant"
    text = render(messages, not ends_with_reply)
    segments: list[Segment] = []
    done = 0  # characters of the text that are in segments already
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
        reply, separator, _ = turn.partition(eos)
        ends = bool(separator) and text.startswith(header + reply + eos)
        if len(header) >= done and text.startswith(header + reply):
            segments.append(Segment(text[done : len(header)]))
            segments.append(Segment(reply, is_response=True, ends=ends or is_last))
            done = len(header + reply) + len(eos) * ends
    return segments if ends_with_reply else [*segments, Segment(text[done:])]


def _split_last_reply(messages: list[Message], render: Render, eos: str) -> tuple[str, str]:
    """Split a rendered conversation at the start of its last reply.

    The reply starts after the generation prompt. If that prompt is not in the conversation (DeepSeek opens
    `<think>`), the reply starts after their common prefix.
    """
    text, prompt = render(messages, False), render(messages[:-1], True)
    if text.startswith(prompt):
        return prompt, text[len(prompt) :]
    question = render(messages[:-1], False).removesuffix(eos)
    begin = common_length([prompt, text])
    # The reply may begin with the same text as the rest of the generation prompt.
    probed = {**messages[-1], "content": PROBE + messages[-1]["content"]}
    reply_begin = render([*messages[:-1], probed], False).find(PROBE)
    begin = min(begin, reply_begin) if reply_begin >= 0 else begin
    if not prompt.startswith(question) or begin < len(question):
        raise ValueError("the chat template renders a conversation differently without its last reply")
    return text[:begin], text[begin:]


def _plain_message(message: Any, name: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{name} must be an object with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{name} has role {role!r}; allowed: {', '.join(ROLES)}")
    for key, value in message.items():
        is_default = key == "weight" and value == (role == "assistant")
        if key not in ("role", "content") and value not in (None, "", [], {}) and not is_default:
            raise ValueError(f"{name} has {key!r}, which is not supported; allowed: 'role' and 'content'")
    if isinstance(content, list):
        content = "".join(_text_of_part(part, name) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name} has content of type {type(content).__name__}; it must be text")
    if not content.strip() and role != "system":
        raise ValueError(f"{name} has no content")
    return {"role": role, "content": content}


def _text_of_part(part: Any, name: str) -> str:
    """The text of a content part: {"type": "text", "text": ...}, or a string."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, dict) and part.get("type", "text") == "text":
        raise ValueError(f"{name} has a content part of type 'text' whose 'text' is not a string")
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"{name} has a content part of type {kind!r}; only text is supported")

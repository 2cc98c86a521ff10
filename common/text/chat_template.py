"""Render conversations with a chat template: independent of the date, safe for control tokens in content."""

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from common.runtime.options import UserError, reason
from common.text.conversation import DEFAULT_CHAT_TEMPLATE, Message, conversation_segments
from common.text.transformers_internals import compile_chat_template

# Some templates write today's date (Llama 3.2, gpt-oss, SmolLM3). Data must not depend on the day of a run,
# so "today" is the default date of Llama 3.2's template.
TODAY = datetime(2024, 7, 26)

MARK = "\ufdd0"  # a Unicode noncharacter: splits control tokens in message content


SECONDS = 10.0  # of processor time for one conversation


class EndlessTemplate(UserError):
    """A template that does not end in time."""


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError after SECONDS; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, SECONDS)  # jinja ignores errors in constants
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class ChatTemplate:
    """The chat template of a tokenizer. Raises UserError for a syntax error in it.

    Control tokens (BOS, EOS, pad, and special tokens that the template writes) are plain text in the content
    of a message: `</s>` is also an HTML tag.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._name = tokenizer.name_or_path or "the tokenizer"
        self._variables = tokenizer.special_tokens_map
        self._control = re.compile("(?!)")  # matches nothing
        self._ignored: set[str] = set()
        try:
            self.source = tokenizer.get_chat_template()
            with _time_limit():
                self._template = compile_chat_template(self.source)
        except TemplateSyntaxError as error:
            raise UserError(f"{self._name}: chat template, line {error.lineno}: {error.message}") from None
        except Exception as error:  # noqa: BLE001 - a template may be anything, or several without a default
            raise UserError(f"{self._name}: chat template: {reason(error)}") from None
        self._ignored = self._ignored_roles()
        if tokens := self._control_tokens(tokenizer):
            self._control = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    @property
    def is_default(self) -> bool:
        """Whether it is the default for tokenizers without a chat template."""
        return self.source == DEFAULT_CHAT_TEMPLATE

    @property
    def has_date(self) -> bool:
        return "strftime_now" in self.source

    def changes_replies(self, eos: str) -> bool:
        """Whether earlier replies of a conversation become context, see `conversation_segments`."""
        messages = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
        try:
            segments = conversation_segments(messages, self.render, eos)
        except ValueError:
            return False
        return sum(segment.is_response for segment in segments) < 2

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Render a conversation; MARK splits the control tokens in its content.

        Raises UserError when the template rejects the conversation, fails or does not end.
        """
        if role := next((m["role"] for m in messages if m["role"] in self._ignored), None):
            raise UserError(f"the chat template of {self._name} ignores {role} messages")
        escaped = [{**message, "content": self._escape(message["content"])} for message in messages]
        try:
            with _time_limit():
                return self._template.render(
                    messages=escaped, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                    strftime_now=TODAY.strftime, **self._variables,
                )  # fmt: skip
        except TimeoutError:
            raise EndlessTemplate(
                f"the chat template of {self._name} does not end: no text after {SECONDS:g} s"
            ) from None
        except Exception as error:  # noqa: BLE001 - templates are programs and raise anything
            raise UserError(
                f"the chat template of {self._name} rejects the conversation: {reason(error)}"
            ) from None

    def _escape(self, content: str) -> str:
        return self._control.sub(lambda token: token[0][:1] + MARK + token[0][1:], content.replace(MARK, ""))

    def _ignored_roles(self) -> set[str]:
        """Roles whose messages the template accepts but does not write."""
        ignored = set()
        for roles in (("user",), ("user", "assistant"), ("system", "user")):
            messages = [{"role": role, "content": f"content{number}"} for number, role in enumerate(roles)]
            try:
                text = self.render(messages, roles[-1] == "user")
            except EndlessTemplate:
                raise
            except ValueError:
                continue
            ignored |= {m["role"] for m in messages if m["content"] not in text}
        return ignored

    def _control_tokens(self, tokenizer: PreTrainedTokenizerFast) -> set[str]:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        written = self.source
        turns: list[Any] = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        for messages in (turns[:1], turns[:2], turns, [{"role": "system", "content": "a"}, turns[0]]):
            try:
                written += self.render(messages, len(messages) % 2 == 1)
            except EndlessTemplate:
                raise
            except ValueError:
                continue
        named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} - {None}
        return {token for token in named | {t for t in special if t in written} if len(token) > 1}

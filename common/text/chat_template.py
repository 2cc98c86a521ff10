"""Render conversations under a tokenizer's chat template, the same on every day and with any content."""

import re
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from common.runtime.options import UserError, reason
from common.text.conversation import DEFAULT_CHAT_TEMPLATE, Message, conversation_segments

# Some templates write today's date (Llama 3.2, gpt-oss, SmolLM3). Data must not depend on the day of a run,
# so "today" is the date that Llama 3.2's template writes where it has no clock.
TODAY = datetime(2024, 7, 26)

MARK = "\ufdd0"  # a Unicode noncharacter: breaks a control token that stands in the content of a message


class ChatTemplate:
    """The chat template of a tokenizer. Raises UserError, naming the tokenizer, for a syntax error in it.

    Control tokens are BOS, EOS, pad and the special tokens that the template writes. In the content of a
    message they are text: `</s>` is a tag of HTML.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._name = tokenizer.name_or_path or "the tokenizer"
        self._variables = tokenizer.special_tokens_map
        self._control = re.compile("(?!)")  # matches nothing
        self._lost: set[str] = set()
        try:
            self.source = tokenizer.get_chat_template()
            self._template = _compile_jinja_template(self.source)
        except TemplateSyntaxError as error:
            raise UserError(f"{self._name}: chat template, line {error.lineno}: {error.message}") from None
        except ValueError as error:  # several named templates, none of them the default
            raise UserError(f"{self._name}: {error}") from None
        self._lost = self._lost_roles()
        if tokens := self._control_tokens(tokenizer):
            self._control = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    @property
    def is_default(self) -> bool:
        """Whether it is the template of this suite, for tokenizers that bring none."""
        return self.source == DEFAULT_CHAT_TEMPLATE

    @property
    def has_date(self) -> bool:
        return "strftime_now" in self.source

    def changes_replies(self, eos: str) -> bool:
        """Whether earlier replies of a conversation are context: see `conversation_segments`."""
        messages = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
        try:
            segments = conversation_segments(messages, self.render, eos)
        except ValueError:
            return False
        return sum(segment.is_response for segment in segments) < 2

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """The conversation as text, in which control tokens of the content are broken by MARK.

        Raises ValueError when the template refuses the conversation, or fails on it.
        """
        if lost := next((message["role"] for message in messages if message["role"] in self._lost), None):
            raise ValueError(f"the chat template of {self._name} leaves out {lost} messages")
        broken = [{**message, "content": self._break(message["content"])} for message in messages]
        try:
            return self._template.render(
                messages=broken, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                strftime_now=TODAY.strftime, **self._variables,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - templates are programs, and raise anything
            raise ValueError(
                f"the chat template of {self._name} refuses the conversation: {reason(error)}"
            ) from None

    def _break(self, content: str) -> str:
        return self._control.sub(lambda token: token[0][:1] + MARK + token[0][1:], content.replace(MARK, ""))

    def _lost_roles(self) -> set[str]:
        """The roles whose messages the template takes and does not write."""
        lost = set()
        for roles in (("user",), ("user", "assistant"), ("system", "user")):
            messages = [{"role": role, "content": f"content{number}"} for number, role in enumerate(roles)]
            try:
                text = self.render(messages, roles[-1] == "user")
            except ValueError:
                continue
            lost |= {m["role"] for m in messages if m["content"] not in text}
        return lost

    def _control_tokens(self, tokenizer: PreTrainedTokenizerFast) -> set[str]:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        written = self.source
        turns: list[Any] = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        for messages in (turns[:1], turns[:2], turns, [{"role": "system", "content": "a"}, turns[0]]):
            try:
                written += self.render(messages, len(messages) % 2 == 1)
            except ValueError:
                continue
        named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} - {None}
        return {token for token in named | {t for t in special if t in written} if len(token) > 1}

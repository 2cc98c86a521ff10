"""A stand-in for the encoder that makes token ids readable."""

from types import SimpleNamespace

from common.text.conversation import Message, Segment

EOS, PAD = 1, 0


class WordEncoder:
    """Every word is a token, numbered from 10 as they come, and EOS is 1."""

    tokenizer = SimpleNamespace(eos_token="</s>")
    bos = ()
    chat_template = None

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        ends = {"user": "", "assistant": "</s> "}
        text = "".join(f"{m['role']} : {m['content']} {ends[m['role']]}" for m in messages)
        return text + "assistant : " * add_generation_prompt

    def encode(self, segments: list[Segment]) -> tuple[list[int], list[bool]]:
        ids, mask = [], []
        for segment in segments:
            part = [10 + len(ids) + i for i in range(len(segment.text.split()))] + [EOS] * segment.ends
            ids, mask = ids + part, mask + [segment.is_response] * len(part)
        return ids, mask

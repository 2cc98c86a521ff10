"""Load a tokenizer, and encode segments of text."""

import copy
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.runtime.files import exists, is_file, is_folder, is_local_path
from common.runtime.options import UserError, reason
from common.text.chat_template import MARK, ChatTemplate
from common.text.conversation import DEFAULT_CHAT_TEMPLATE, Message, Segment
from common.text.fields import shown

PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")

# Part of the cache key: other versions may render or split a text differently.
VERSIONS = [(name, version(name)) for name in ("jinja2", "tokenizers", "transformers")]
JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Settings of tokenizer_config.json whose type transformers does not check.
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SETTINGS = {
    **dict.fromkeys(TOKENS, ((str, dict), "a token")),
    **dict.fromkeys(("tokenizer_class", "padding_side", "truncation_side"), (str, "text")),
    "chat_template": ((str, list), "text, or a list of templates with `name` and `template`"),
    "model_max_length": ((int, float), "a number"),
    "added_tokens_decoder": (dict, "an object with a token for each id"),
}
CUSTOM_CODE = "needs custom code, which is not run; convert it, or use a tokenizer class of transformers"


def load_tokenizer(path: str, default_template: str = DEFAULT_CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder or hub name, with a chat template and a pad token other than EOS.

    A SentencePiece `tokenizer.model` without a `tokenizer.json` is converted if the result is exact. Raises
    UserError for a missing or unusable tokenizer and for one without EOS.
    """
    folder = Path(path)
    if not exists(folder) and is_local_path(path):
        raise UserError(f"{path}: No such folder; a model is a folder or a hub name")
    _check_files(folder)
    try:
        if exists(folder / "tokenizer.model") and not exists(folder / "tokenizer.json"):
            from common.text.sentencepiece import load_sentencepiece_folder

            tokenizer = load_sentencepiece_folder(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("a")  # settings of a wrong type fail at the first use
    except Exception as error:  # noqa: BLE001 - a damaged or unknown tokenizer raises anything
        if "custom code" in str(error):
            raise UserError(f"{path}: {CUSTOM_CODE}") from None
        why = reason(error)
        if is_folder(folder) and not any(exists(folder / name) for name in TOKENIZERS):
            why = f"the folder has none of {', '.join(TOKENIZERS)}"
        raise UserError(f"{path}: no usable tokenizer: {why}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{path}: the tokenizer has no fast version (tokenizer.json), which Triptych needs")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so no response can end")
    if not isinstance(tokenizer.chat_template or "", str | dict):
        raise UserError(f"{path}: chat_template is {tokenizer.chat_template!r}; it must be text")
    tokenizer.chat_template = tokenizer.chat_template or default_template
    _ensure_pad_token(tokenizer)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raise UserError for a tokenizer file that is not a JSON object."""
    for name in JSON_FILES:
        if not is_file(folder / name):
            continue
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{folder / name}: not readable as JSON: {reason(error)}") from None
        if not isinstance(content, dict):
            raise UserError(f"{folder / name}: must be a JSON object, not {type(content).__name__}")
        if name == "tokenizer_config.json":
            _check_settings(folder / name, content)


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """Raise UserError for a setting of a wrong type."""
    for name, (kinds, allowed) in SETTINGS.items():
        value = settings.get(name)
        is_valid = value is None or isinstance(value, kinds)
        if name == "chat_template" and isinstance(value, list):
            is_valid = all(isinstance(part, dict) and {"name", "template"} <= part.keys() for part in value)
        if name == "added_tokens_decoder" and isinstance(value, dict):
            is_valid = all(key.isdecimal() and isinstance(token, dict) for key, token in value.items())
        if not is_valid:
            raise UserError(f"{file}: {name} is {shown(value)}; it must be {allowed}")


def _ensure_pad_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Set a pad token other than EOS: the tokenizer's own, a known name, the unknown token, or a new one.

    Masks do not use it, but transformers finds the end of a scored text by it, and generation returns it.
    """
    special = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    known = [name for name in (*PAD_NAMES, tokenizer.unk_token) if vocabulary.get(name) is not None]
    for name in known:
        if vocabulary[name] not in special:
            tokenizer.pad_token = name
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


class SegmentEncoder:
    """Encodes the segments of a text, such as prompt and response, so that their ids can be concatenated.

    A tokenizer may add BOS or a dummy space at the start of a text. Only the first segment needs them; later
    segments use a copy of the tokenizer that adds neither.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
        self._begin = tokenizer.backend_tokenizer
        special = (self.bos, self.eos_token_id, tokenizer.chat_template, tokenizer.special_tokens_map)
        content = f"{self._begin.to_str()} {special} {VERSIONS}"
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self._continue = _without_prefix(self._begin)
        self.chat_template = ChatTemplate(tokenizer) if tokenizer.chat_template else None

    def encode(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        """Token ids of all segments, and a response mask that includes EOS."""
        ids: list[int] = []
        is_response: list[bool] = []
        for number, segment in enumerate(segments):
            part = self._ids(segment.text, self._continue if number else self._begin)
            if number == 0 and part[:1] != self.bos:
                part = self.bos + part
            if segment.ends and part[-1:] != [self.eos_token_id]:
                part = part + [self.eos_token_id]
            ids += part
            is_response += [segment.is_response] * len(part)
        return ids, is_response

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Render a conversation, see `ChatTemplate.render`."""
        assert self.chat_template is not None
        return self.chat_template.render(messages, add_generation_prompt)

    def _ids(self, text: str, backend: Tokenizer) -> list[int]:
        """Token ids of a text. A control token that MARK splits is encoded as plain text."""
        first, *others = text.split(MARK)
        ids = backend.encode(first, add_special_tokens=False).ids
        for part in others:
            ids += self._continue.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Decode tokens as they are, special ones too."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def decode_prompt(self, prompt_ids: list[int]) -> str:
        """Decode a prompt for display: without BOS, EOS and padding, but with role markers."""
        hidden = {self.tokenizer.bos_token_id, self.eos_token_id, self.pad_token_id}
        return self.tokenizer.decode([token for token in prompt_ids if token not in hidden])

    def decode_response(self, prompt_ids: list[int], response_ids: list[int]) -> str:
        """Decode a response, without special tokens, but with its leading space."""
        prompt = self.tokenizer.decode(prompt_ids, skip_special_tokens=True)
        return self.tokenizer.decode(prompt_ids + response_ids, skip_special_tokens=True)[len(prompt) :]


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    """Copy a tokenizer without the space that SentencePiece adds in front of a text."""
    spec = json.loads(backend.to_str())
    original = copy.deepcopy(spec)
    for part in ("normalizer", "pre_tokenizer"):
        nested = spec[part] or {}
        steps = nested.get("normalizers") or nested.get("pretokenizers") or [nested]
        for step in steps:
            if step.get("type") == "Metaspace":
                step["prepend_scheme"] = "never"
            if step.get("type") == "Strip":
                step["strip_left"] = False
            if step.get("type") == "ByteLevel":
                step["add_prefix_space"] = False
        steps[:] = [step for step in steps if not _acts_at_the_beginning(step)]
        if nested.get("type") == "Prepend":
            spec[part] = None
    return backend if spec == original else Tokenizer.from_str(json.dumps(spec))


def _acts_at_the_beginning(step: dict[str, Any]) -> bool:
    """Whether a normalizer adds or removes a space in front of a text."""
    pattern = step.get("pattern") if isinstance(step.get("pattern"), dict) else {}
    return step.get("type") == "Prepend" or pattern.get("Regex", "").startswith("\\A")

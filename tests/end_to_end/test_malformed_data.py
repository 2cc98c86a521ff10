"""Malformed records are refused in one line: file, line, field, and allowed values."""

import json
from functools import partial
from pathlib import Path

import pytest

from common.data.loading import load_examples
from common.runtime.options import DataOptions, UserError
from common.text.prompts import Prompt, tokenize_prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from step1_sft.data import Demonstration, tokenize_demonstration
from step2_reward.data import Preference, tokenize_preference

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SIDES = {"prompt": "a", "response_a": "b", "response_b": "c"}
RANKING = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}
FIT = {"max_length": 64, "overlong": "truncate_prompt"}
CONVERT = {
    1: (Demonstration, partial(tokenize_demonstration, **FIT, loss_on="response")),
    2: (Preference, partial(tokenize_preference, **FIT, use_margin=True)),
    3: (Prompt, partial(tokenize_prompt, **FIT)),
}

# (stage, line of the file or record, what the message says)
MALFORMED = [
    (1, b'{"prompt": "a", ', "not valid JSON"),
    (1, b"hello", "not valid JSON"),
    (1, b'{"prompt": "a"} {"prompt": "b"}', "not valid JSON: Extra data"),
    (1, b'{"prompt": "\xff", "completion": "b"}', "not UTF-8 text"),
    (1, [PAIR], "must be a JSON object, not list"),
    (1, "a", "must be a JSON object, not str"),
    (1, None, "must be a JSON object, not NoneType"),
    (1, {}, "'prompt' is missing"),
    (1, {"prompt": "a"}, "'completion' is missing"),
    (1, {"completion": "a"}, "'prompt' is missing"),
    (1, b'{"prompt": "a", "completion": "b \\ud83d"}', "'completion' has half a character (\\ud83d)"),
    (1, b'{"prompt": "a", "completion": "b", "id": {"x": ["\\udc00"]}}', "'id' has half a character"),
    (3, b'{"prompt": [{"role": "user", "content": "\\udfff\\ud83d"}]}', "'prompt' has half a character"),
    (1, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (1, b'{"prompt": ' + b"1" * 5000 + b"}", "thousands of digits"),
    (1, {"prompt": "", "completion": "b"}, "'prompt' is empty"),
    (1, {"prompt": "a", "completion": " \n"}, "'completion' is empty"),
    (1, {"prompt": None, "completion": "b"}, "'prompt' is missing"),
    (1, {"prompt": "a", "completion": 3}, "'completion' is int"),
    (1, {"prompt": "a", "completion": {"text": "b"}}, "'completion' is dict"),
    (1, {"prompt": "x", "completion": [USER, ASSISTANT]}, "'prompt' is not one of the user messages"),
    (2, PAIR | {"chosen": [ASSISTANT]}, "'prompt' is a string but 'chosen' is a list of messages"),
    (1, {"prompt": [USER], "completion": [USER]}, "'completion' must end with an assistant message"),
    (1, {"messages": []}, "'messages' is empty"),
    (1, {"messages": "a"}, "'messages' is a string"),
    (1, {"messages": [USER]}, "no assistant message"),
    (1, {"messages": [ASSISTANT, USER, ASSISTANT]}, "begins with the assistant"),
    (3, {"messages": [ASSISTANT]}, "'messages' has nothing before"),
    (1, {"messages": ["a", "b"]}, "message 0 must be an object"),
    (1, {"messages": [USER, {"role": "assistant"}]}, "message 1 must be an object with 'role' and 'content'"),
    (1, {"messages": [USER, {"role": "bot", "content": "b"}]}, "message 1 has role 'bot'; allowed: system"),
    (1, {"messages": [USER, {"role": "assistant", "content": ""}]}, "message 1 has no content"),
    (1, {"messages": [USER, {"role": "assistant", "content": 5}]}, "message 1 has content of type int"),
    (1, {"conversations": "a"}, "'conversations' is str"),
    (1, {"conversations": [{"from": "human"}]}, "turn 0 must have 'from' and 'value'"),
    (1, {"conversations": [{"from": "cat", "value": "a"}]}, "turn 0 is from 'cat'; allowed: human"),
    (1, {"instruction": 1, "output": "b"}, "'instruction' and 'input' must be strings"),
    (1, {"conversations": [{"from": ["a"], "value": "b"}]}, "turn 0 is from ['a']; allowed: human"),
    (1, {"instruction": "", "output": "b"}, "'instruction' and 'input' are empty"),
    (1, {"instruction": "a"}, "'completion' is missing"),
    (1, {"prompt": "a", "completion": "b", "ended": "perhaps"}, "'ended' is 'perhaps'; it must be true or"),
    (1, {"prompt": "a", "completion": "b", "system": "c"}, "'system' cannot be used"),
    (1, {"instruction": "a", "output": "b", "history": [["c"]]}, "'history' must be a list of pairs"),
    (2, {"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    (2, {"prompt": "a", "rejected": "b"}, "'chosen' is missing"),
    (2, PAIR | {"rejected": ""}, "'rejected' is empty"),
    (2, PAIR | {"chosen": [ASSISTANT]}, "make both one kind"),
    (2, PAIR | {"margin": "large"}, "'margin' is 'large'; it must be a number"),
    (2, PAIR | {"margin": True}, "'margin' is True"),
    (2, PAIR | {"margin": float("nan")}, "'margin' is nan; it must be a number"),
    (2, PAIR | {"margin": 10**400}, "'margin' is 1000"),
    (2, PAIR | {"margin": "1e999"}, "'margin' is '1e999'; it must be a number"),
    (2, PAIR | {"tie": "perhaps"}, "'tie' is 'perhaps'; it must be true or false"),
    (2, PAIR | {"tools": [{"name": "look_up"}]}, "'tools' changes the input of the model"),
    (2, RANKING | {"ranks": "[1]"}, "'ranks' must be a list of 2 numbers"),
    (2, {"chosen": "ab", "rejected": "cd"}, "no common beginning"),
    (2, {"chosen": "ab", "rejected": "ab"}, "are identical"),
    (2, {"chosen": [USER, ASSISTANT], "rejected": "a"}, "must both be"),
    (2, {"prompt": "a", "response_a": "b", "preference": "A"}, "'response_b' is missing"),
    (2, SIDES | {"preference": "C"}, "preference is 'C'; allowed: A B tie"),
    (2, SIDES, "preference is None; allowed: A B tie"),
    (2, SIDES | {"votes": []}, "'votes' must be a list"),
    (2, SIDES | {"votes": ["A", 1]}, "preference is 1; allowed"),
    (2, RANKING | {"responses": ["b"]}, "two responses or more"),
    (2, RANKING | {"ranks": [1]}, "'ranks' must be a list of 2 numbers"),
    (2, RANKING | {"ranks": ["first", 2]}, "'first' is not a number"),
    (2, RANKING | {"ranks": [1, 1]}, "all are equal"),
    (2, RANKING | {"responses": ["b", ""]}, "'responses[1]' is empty"),
    (2, {"prompt": "a", "responses": ["b", "c"]}, "'ranks' is missing"),
    (3, {"text": "a"}, "'prompt' is missing"),
    (3, {"prompt": []}, "'prompt' is empty"),
    (3, {"prompt": 1}, "'prompt' is int"),
    (3, {"prompt": [{"role": "user", "content": " "}]}, "message 0 has no content"),
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder(world: Path) -> SegmentEncoder:
    return SegmentEncoder(load_tokenizer(str(world / "model")))


@pytest.mark.parametrize(("stage", "line", "message"), MALFORMED)
def test_malformed_record_is_one_line(
    tmp_path: Path, encoder: SegmentEncoder, stage: int, line: object, message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n" + (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
    row_class, convert = CONVERT[stage]
    options = DataOptions(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError) as error:
        load_examples([str(path)], options, row_class, partial(convert, encoder=encoder))
    result = str(error.value)
    assert result.startswith(f"{path}:2: ") and message in result and "\n" not in result

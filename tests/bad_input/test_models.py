"""Model folders that are no folders, damaged configurations, tokenizers and weights, and chat templates."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.commands import DATA, MODEL, READS_MODEL, RECORDS, check_refusal

DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BINARY = bytes(range(256))
Change = Callable[[Path], Any]


def put(name: str, content: bytes) -> Change:
    return lambda model: (model / name).write_bytes(content)


def edit(name: str, **settings: Any) -> Change:
    def change(model: Path) -> None:
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | settings))

    return change


def folder(name: str) -> Change:
    return lambda model: ((model / name).unlink(), (model / name).mkdir())


def config(**settings: Any) -> Change:
    return edit("config.json", **settings)


def tokenizer(**settings: Any) -> Change:
    return edit("tokenizer_config.json", **settings)


# Damage of a copy of the model, and a part of the line.
DAMAGED = {
    "config deep": (put("config.json", DEEP), "config.json: "),
    "config binary": (put("config.json", BINARY), "config.json: not readable"),
    "config list": (put("config.json", b"[1]"), "config.json: must hold one JSON object"),
    "config folder": (folder("config.json"), "config.json: not readable"),
    "model type": (config(model_type="nope"), "config.json: "),
    "model type list": (config(model_type=["llama"]), "config.json: "),
    "hidden size": (config(hidden_size=0), "hidden_size is 0"),
    "hidden text": (config(hidden_size="x"), "config.json: "),
    "activation": (config(hidden_act="nope"), "config.json: "),
    "rope": (config(rope_parameters={"rope_type": "nope"}), "config.json: "),
    "epsilon": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "architectures": (config(architectures=5), "architectures"),
    "layers": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "quantised": (config(quantization_config=5), "config.json: "),
    "tokenizer deep": (put("tokenizer.json", DEEP), "tokenizer.json: not readable as JSON"),
    "tokenizer binary": (put("tokenizer.json", BINARY), "tokenizer.json: not readable as JSON"),
    "tokenizer empty": (put("tokenizer.json", b"{}"), "no usable tokenizer"),
    "tokenizer model": (edit("tokenizer.json", model={"type": "Nope", "vocab": {}}), "no usable tokenizer"),
    "normalizer": (edit("tokenizer.json", normalizer={"type": "Nope"}), "no usable tokenizer"),
    "settings deep": (put("tokenizer_config.json", DEEP), "tokenizer_config.json: not readable as JSON"),
    "EOS": (tokenizer(eos_token={"x": 1}), "tokenizer"),
    "length": (tokenizer(model_max_length="long"), "model_max_length is 'long'"),
    "added tokens": (tokenizer(added_tokens_decoder={"x": 5}), "added_tokens_decoder"),
    "template number": (tokenizer(chat_template=5), "chat_template is 5"),
    "weights empty": (put("model.safetensors", b""), "model.safetensors: is empty"),
    "weights binary": (put("model.safetensors", BINARY), "model.safetensors: not read"),
    "weights folder": (folder("model.safetensors"), "model"),
    "adapter": (put("adapter_config.json", b"{}"), "a peft adapter"),
}
LOOP, END = "{%% for %s in range(99999) %%}", "{% endfor %}"
TEMPLATES = {
    "TypeError": ("{{ 1 + 'a' }}", "rejects the conversation: unsupported operand"),
    "ZeroDivisionError": ("{{ 1 / 0 }}", "rejects the conversation: division by zero"),
    "OverflowError": ("{{ 'a' * (10 ** 30) }}", "rejects the conversation: cannot fit"),
    "MemoryError": ("{{ 'a' * (10 ** 14) }}", "rejects the conversation: MemoryError"),
    "RecursionError": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    "UndefinedError": ("{{ a.b.c }}", "'a' is undefined"),
    "AttributeError": ("{{ messages.x() }}", "rejects the conversation"),
    "raised": ("{{ raise_exception('no\nway') }}", "rejects the conversation: no"),
    "syntax": ("{% for %}", "chat template, line 1"),
    "filter": ("{{ 1|x }}", "No filter named 'x'"),
    "include": ("{% include 'x' %}", "rejects the conversation"),
    "constant": ("abc", "ignores user messages"),
    "power": ("{{ (7 ** (7 ** 10)) % 2 }}", "does not end"),
    "loop": (f"{LOOP % 'a'}{LOOP % 'b'}{END}{END}", "does not end"),
    "text": (f"{LOOP % 'a'}{LOOP % 'b'}x{END}{END}", "does not end"),
}  # fmt: skip
COMMANDS = [name for name in READS_MODEL if name not in ("plan", "evaluate_reward", "score")]
NAMES = {
    "a file": "DIR/file", "a device": "/dev/null", "too long": "DIR/" + "m" * 300, "a space": " ",
    "the root": "/", "a tab": "a\tb", "no folder": "DIR/none",
}  # fmt: skip


def damaged(models: Path, folder: Path, command: str, change: Change) -> list[str]:
    """The option with a changed copy of the model."""
    shutil.copytree(models / "model", folder / "model")
    change(folder / "model")
    return [f"--{MODEL.get(command, 'model_name_or_path')}", "DIR/model"]


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folder_is_refused(models: Path, tmp_path: Path, name: str) -> None:
    change, part = DAMAGED[name]
    command = COMMANDS[[*DAMAGED].index(name) % len(COMMANDS)]
    words = damaged(models, tmp_path, command, change)
    check_refusal(command, words, ["DIR/model", part], models, tmp_path)


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("common.text.chat_template.SECONDS", 0.2)
    text, part = TEMPLATES[name]
    command = [one for one in COMMANDS if one in DATA][[*TEMPLATES].index(name) % (len(COMMANDS) - 1)]

    def change(model: Path) -> None:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer(chat_template=text)(model)

    words = [*damaged(models, tmp_path, command, change), f"--{DATA[command]}", "DIR/messages.jsonl"]
    record = RECORDS[command] | {"prompt": [{"role": "user", "content": "a"}]}
    files = {"messages.jsonl": 3 * f"{json.dumps(record)}\n"}
    check_refusal(command, words, ["DIR/model", part], models, tmp_path, files)


@pytest.mark.parametrize("command", READS_MODEL)
def test_name_is_refused(models: Path, tmp_path: Path, command: str) -> None:
    names = [*NAMES.values()]
    words = [f"--{MODEL.get(command, 'model_name_or_path')}", names[READS_MODEL.index(command) % len(names)]]
    check_refusal(command, words, [], models, tmp_path, {"file": b"x"})

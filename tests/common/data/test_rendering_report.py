"""Log lines about the rendering of prompts."""

import json
from functools import partial
from pathlib import Path

import pytest

from common.data.loading import load_examples
from common.data.multi_encoder import load_shared_records
from common.runtime.options import CacheOptions, DataOptions
from common.text.conversation import DEFAULT_CHAT_TEMPLATE
from common.text.tokenizer import SegmentEncoder
from step1_sft.data import Demonstration, tokenize_demonstration
from tests.common.text.test_chat_templates import CHATML, make_encoder

QWEN3 = CHATML.replace(
    "\n{{ m.content }}", "\n{{ '<think></think>' if loop.last and m.role != 'user' }}{{ m.content }}"
)


def lines(tmp_path: Path, capsys: pytest.CaptureFixture, encoder: SegmentEncoder, prompts: list) -> str:
    records = [{"prompt": prompt, "completion": "A plum."} for prompt in prompts]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    convert = partial(
        tokenize_demonstration,
        encoder=encoder,
        max_length=512,
        overlong="truncate_prompt",
        loss_on="response",
    )
    options = DataOptions(eval_fraction=0, cache_dir=str(tmp_path / "cache"))
    load_examples([str(file)], options, Demonstration, convert)
    return capsys.readouterr().out


def test_counts_example_and_warning(tmp_path, capsys):
    encoder = make_encoder(CHATML, "<|im_end|>")
    encoder.tokenizer.name_or_path = "some/model"
    text = lines(
        tmp_path, capsys, SegmentEncoder(encoder.tokenizer), [[{"role": "user", "content": "q"}], "Q:"]
    )
    assert "d.jsonl: 1 prompts rendered with the chat template of some/model, 1 prompts used verbatim" in text
    assert r"the first row: '<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nA plum.<|im_end|>'" in text
    assert "warning: 1 prompts are strings, so the chat template of some/model is not applied" in text


def test_no_warning_for_strings_with_the_default_template(tmp_path, capsys):
    text = lines(tmp_path, capsys, make_encoder(DEFAULT_CHAT_TEMPLATE, "</s>"), ["Q:", "R:"])
    assert "d.jsonl: 2 prompts used verbatim; the first row: 'Q:A plum.</s>'" in text
    assert "chat template" not in text


def test_dates_and_changed_replies_are_logged(tmp_path, capsys):
    encoder = make_encoder("{{ strftime_now('%Y') }}" + QWEN3, "<|im_end|>")
    text = lines(tmp_path, capsys, encoder, [[{"role": "user", "content": "q" * 300}]])
    assert "writes today's date; every run uses 26 Jul 2024" in text
    assert "changes earlier replies of a conversation: training uses only the last reply" in text
    assert "qqq ... qqq" in text


def test_only_used_records_are_counted(tmp_path, capsys):
    file, held_out = tmp_path / "d.jsonl", tmp_path / "e.jsonl"
    for path in (file, held_out):
        records = ({"prompt": f"Q{number}:", "completion": "A plum."} for number in range(40))
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    encoder = make_encoder(DEFAULT_CHAT_TEMPLATE, "</s>")
    convert = partial(
        tokenize_demonstration,
        encoder=encoder,
        max_length=512,
        overlong="truncate_prompt",
        loss_on="response",
    )
    options = DataOptions(eval_data=[f"{held_out}:2"], data_split="1,1,0", cache_dir=str(tmp_path / "cache"))
    train, _ = load_examples([f"{file}:0.5"], options, Demonstration, convert)
    printed = capsys.readouterr().out
    assert 0 < len(train) < 20
    assert f"d.jsonl: {len(train)} prompts used verbatim" in printed
    assert "e.jsonl: 40 prompts used verbatim" in printed
    options = CacheOptions(cache_dir=str(tmp_path / "cache"))
    shared = load_shared_records(
        [f"{file}:0.5", str(held_out)], options, Demonstration, [convert], at_most=30
    )
    printed = capsys.readouterr().out
    of_first = sum(str(file) in origin for origin in shared.origins)
    assert 0 < of_first < 30
    assert f"d.jsonl: {of_first} prompts used verbatim" in printed
    assert f"e.jsonl: {30 - of_first} prompts used verbatim" in printed

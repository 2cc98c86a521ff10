"""Comparison of models: metrics against plain transformers, the table, one-line errors."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from common.generation.generate import PlainEngine
from common.model.loading import load_causal_lm
from common.model.vocabulary import fit_to_tokenizer
from common.runtime.options import UserError
from common.text.tokenizer import SegmentEncoder
from step1_sft.data import Demonstration
from step1_sft.evaluate import check_output, greedy_answers, response_bytes
from step1_sft.options import SampleAnswerOptions
from tests.end_to_end.test_bad_input import check_refusal
from tests.end_to_end.test_launch import bash
from tests.ranks import succeed
from tests.stages import ZERO

TURNS = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Größe"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "ab"},
]


@pytest.fixture(scope="module")
def data(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short conversations and one with two replies."""
    file = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    lines = (world / "demonstrations.jsonl").read_text().splitlines()[:10]
    file.write_text("\n".join([*lines, json.dumps({"messages": TURNS})]))
    return file


@pytest.fixture(scope="module")
def short(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context length of 48."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(world / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    return folder


def compare(folder: Path, models: list[Path], data: Path, *words: str, ranks: int = 1) -> list[dict]:
    file = folder / "results.json"
    options = ["--model_name_or_path", *map(str, models), "--eval_data", str(data), "--output", str(file)]
    succeed(
        "step1_sft.evaluate", [*options, "--num_samples", "2", "--sample_length", "3", *words], folder, ranks
    )
    return json.loads(file.read_text())


def by_transformers(model: Path, lines: list[str]) -> tuple[float, int, float]:
    """Cross-entropy per reply token, number of reply tokens, and bits per byte; one text at a time."""
    tokenizer, module = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    nats = tokens = size = 0.0
    for line in lines:
        messages = json.loads(line)["messages"]
        ids = tokenizer(
            tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt"
        ).input_ids
        labels = torch.full_like(ids, -100)
        for turn in range(1, len(messages), 2):
            begin, end = (
                len(tokenizer(tokenizer.apply_chat_template(part, tokenize=False, **kind)).input_ids)
                for part, kind in (
                    (messages[:turn], {"add_generation_prompt": True}),
                    (messages[: turn + 1], {}),
                )
            )
            labels[:, begin:end] = ids[:, begin:end]
            size += len(messages[turn]["content"].encode())
        count = int((labels != -100).sum())
        nats, tokens = nats + module(ids, labels=labels).loss.item() * count, tokens + count
    return nats / tokens, int(tokens), nats / math.log(2) / size


def test_metrics_match_plain_transformers(world: Path, data: Path, tmp_path: Path) -> None:
    (result,) = compare(tmp_path, [world / "model"], data)
    loss, tokens, bits = by_transformers(world / "model", data.read_text().splitlines())
    assert (result["records"], result["response_tokens"]) == (11, tokens)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert result["samples"][1]["prompt"] and len(result["samples"]) == 2


@pytest.mark.end_to_end
@pytest.mark.parametrize("zero", ["zero0", "zero3"])
def test_two_ranks_match_one(world: Path, short: Path, data: Path, tmp_path: Path, zero: str) -> None:
    models, config = [world / "model", short], ["--zero_config", str(ZERO / f"{zero}.json")]
    alone = compare(tmp_path, models, data)
    together = compare(tmp_path, models, data, *config, "--micro_batch_size", "4", ranks=2)
    for one, other in zip(alone, together, strict=True):
        assert other == {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in one.items()}


@pytest.mark.end_to_end
def test_all_models_are_evaluated_on_the_records_that_fit_all(
    world: Path, short: Path, data: Path, tmp_path: Path
) -> None:  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(short)
    texts = {
        line: tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        for line in data.read_text().splitlines()
    }
    fitting = [line for line, text in texts.items() if len(tokenizer(text).input_ids) <= 48]
    assert 0 < len(fitting) < 11
    (tmp_path / "fitting.jsonl").write_text("\n".join(fitting))
    both = compare(tmp_path, [world / "model", short], data)
    (alone,) = compare(tmp_path, [short], tmp_path / "fitting.jsonl")
    for result in both:  # their weights are the same
        assert result | {"model": ""} == alone | {"model": ""}


def test_response_bytes_counts_replies_only():
    assert response_bytes({"messages": TURNS}) == 7 + 2
    assert response_bytes({"messages": TURNS}, last_only=True) == 2
    assert response_bytes({"prompt": TURNS[:1], "completion": TURNS[1:]}) == 2
    assert response_bytes({"prompt": "Hello", "completion": " Größe"}) == 8


def test_answers_end_at_the_context_length(world: Path) -> None:
    encoder = SegmentEncoder(AutoTokenizer.from_pretrained(world / "model"))
    config = GPT2Config(vocab_size=len(encoder.tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=20)
    model = fit_to_tokenizer(AutoModelForCausalLM.from_config(config), encoder.tokenizer)
    rows = [Demonstration([*range(5, 5 + n)], [False] * (n - 1) + [True]) for n in (19, 10)]
    answers = greedy_answers(PlainEngine(model), rows, encoder, SampleAnswerOptions(sample_length=64))
    assert [len(encoder.tokenizer(answer.answer).input_ids) for answer in answers] <= [2, 2]
    assert greedy_answers(PlainEngine(model), [], encoder, SampleAnswerOptions()) == []


def test_answers_are_those_of_transformers(world: Path) -> None:
    encoder = SegmentEncoder(AutoTokenizer.from_pretrained(world / "model"))
    model = load_causal_lm(str(world / "model"), encoder.tokenizer, None)
    ids = [encoder.tokenizer(text).input_ids for text in ("Hello!", "Where is it?", "Good")]
    rows = [Demonstration([*row, 5], [False] * len(row) + [True]) for row in ids]
    answers = greedy_answers(PlainEngine(model), rows, encoder, SampleAnswerOptions(sample_length=12))
    for answer, row in zip(answers, ids, strict=True):
        full = model.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False)[0].tolist()
        end = full.index(encoder.tokenizer.eos_token_id) if encoder.tokenizer.eos_token_id in full else None
        assert answer.answer == encoder.decode_response(row, full[len(row) : end])


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--eval_data", "FOLDER/no.jsonl"], ["no.jsonl", "No such file"]),
        (["--model_name_or_path", "MODEL", "FOLDER"], ["FOLDER", "config.json is missing"]),
        (["--max_length", "8"], ["held_out.jsonl", "no rows left"]),
        (["--output", "FOLDER/no/results.json"], ["--output", "no such folder"]),
        (["--eval_data", "FOLDER/bad.jsonl"], ["bad.jsonl:2", "'completion'"]),
    ],
)
def test_bad_input_is_one_line(world: Path, data: Path, tmp_path: Path, words, parts) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    for name, path in {"FOLDER": tmp_path, "MODEL": world / "model"}.items():
        words, parts = ([text.replace(name, str(path)) for text in texts] for texts in (words, parts))
    given = ["--model_name_or_path", str(world / "model"), "--eval_data", str(data), *words]
    check_refusal("step1_sft.evaluate", given, parts, tmp_path, tmp_path / "out")


def test_an_unwritable_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output("")
    check_output("results.json")
    check_output(str(tmp_path / "results.json"))
    with pytest.raises(UserError, match="--output .*: is a folder"):
        check_output(str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="--output .*: no permission to write"):
        check_output(str(tmp_path / "results.json"))


def test_the_script_prints_a_table_and_leaves_no_files(
    world: Path, short: Path, data: Path, tmp_path: Path
) -> None:  # fmt: skip
    words = ["--model_name_or_path", str(world / "model"), str(short), "--eval_data", str(data)]
    done = bash("evaluate_sft.sh", words, tmp_path, NUM_GPUS="2")
    assert done.returncode == 0, done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert "bits per byte" in rows[0] and str(world / "model") in rows[2] and str(short) in rows[3]
    assert len({len(row) for row in rows}) == 1
    assert not list(tmp_path.iterdir())

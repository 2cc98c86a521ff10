"""Bad records, over all commands that read data; tests/end_to_end/test_malformed_data.py has more kinds."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bad_input.commands import DATA, RECORDS, check_refusal

HALF = "a\ud83d"  # half of a character: a lone surrogate


def change(**fields: Any) -> Any:
    return lambda record: json.dumps(record | fields).encode()


def add(field: bytes) -> Any:
    return lambda record: json.dumps(record).encode()[:-1] + b', "x": ' + field + b"}"


# A line of the file, from a good record, and a part of the message.
LINES = {
    "half a character in a text": (change(prompt=HALF), "'prompt' has half a character"),
    "half a character in a message": (
        change(prompt=[{"role": "user", "content": HALF}]),
        "'prompt' has half a character",
    ),
    "half a character elsewhere": (change(x={"y": [HALF]}), "'x' has half a character"),
    "nested too deep": (add(b"[" * 100_000 + b"]" * 100_000), "nested too deep"),
    "number too long": (add(b"1" * 5000), "thousands of digits"),
    "not text": (lambda _: bytes(range(128, 256)), "not UTF-8 text"),
    "UTF-16": (lambda record: json.dumps(record).encode("utf-16"), "not UTF-8 text"),
    "NaN": (change(prompt=float("nan")), "'prompt' is float"),
    "zeros": (lambda _: b"\0" * 99, "not valid JSON"),
    "role": (change(prompt=[{"role": "bot", "content": "a"}]), "role 'bot'"),
}
EVERY = list(DATA)
CASES = [(command, name) for number, command in enumerate(EVERY) for name in list(LINES)[number % 3 :: 3]]
MARGINS = [
    b"NaN", b"-Infinity", b"1e999", b"-1", b"-1e-9", b"1e39", b"1" + b"0" * 400, b'"nan"', b'"x"', b"true",
    b"[1]",
]  # fmt: skip


@pytest.mark.parametrize(("command", "name"), CASES)
def test_record_is_refused(models: Path, tmp_path: Path, command: str, name: str) -> None:
    make, part = LINES[name]
    words, files = [f"--{DATA[command]}", "DIR/bad.jsonl"], {"bad.jsonl": make(RECORDS[command]) + b"\n"}
    check_refusal(command, words, ["DIR/bad.jsonl:1: ", part], models, tmp_path, files)


@pytest.mark.parametrize("command", EVERY)
def test_file_of_bad_records_alone_is_refused(models: Path, tmp_path: Path, command: str) -> None:
    """Also with --skip_bad_records."""
    words = [f"--{DATA[command]}", "DIR/bad.jsonl", "--skip_bad_records"]
    files = {"bad.jsonl": b"[" * 100_000}
    check_refusal(command, words, ["no rows left", "nested too deep"], models, tmp_path, files)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, "'chosen_is_harmful' is missing"),
        ({"chosen_is_harmful": 1, "rejected_is_harmful": True}, "'chosen_is_harmful' is 1"),
    ],
)
def test_pair_without_signs_of_harm_is_refused(models: Path, tmp_path: Path, fields: dict, part: str) -> None:
    words = ["--train_data", "DIR/bad.jsonl", "--objective", "cost"]
    files = {"bad.jsonl": RECORDS["step2_reward"] | fields}
    check_refusal("step2_reward", words, ["DIR/bad.jsonl:1: ", part], models, tmp_path, files)


@pytest.mark.parametrize("margin", MARGINS, ids=lambda margin: margin[:12].decode())
def test_margin_is_refused(models: Path, tmp_path: Path, margin: bytes) -> None:
    record = json.dumps(RECORDS["step2_reward"]).encode()[:-1] + b', "margin": ' + margin + b"}"
    words = ["--train_data", "DIR/bad.jsonl", "--use_margin"]
    check_refusal(
        "step2_reward",
        words,
        ["DIR/bad.jsonl:1: field 'margin' is "],
        models,
        tmp_path,
        {"bad.jsonl": record},
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"labels": [1, 1e39]}, "field 'labels': that of step 2 is 1e+39"),
        ({"labels": [1, float("nan")]}, "field 'labels': that of step 2 is nan"),
        ({"labels": [-1, 1]}, "field 'labels': that of step 1 is -1"),
        ({"labels": [[1], 1]}, "field 'labels': that of step 1 is [1]"),
        ({"labels": "10"}, "field 'labels' must be a list of 2 labels"),
        ({"steps": ["b", None]}, "field 'steps': step 2 is None"),
        ({"steps": {"0": "b"}}, "field 'steps' must be a list"),
        ({"steps": ["b\n\nb", "c"]}, "step 1 contains --step_separator"),
        ({"question": {"problem": "a"}, "label": {"steps": [5]}}, "not those of a PRM800K record"),
        ({"input": "a Step 1: b ки", "label": "a"}, "as in Math-Shepherd"),
    ],
)
def test_labelled_steps_are_refused(models: Path, tmp_path: Path, change: dict, part: str) -> None:
    record = json.dumps(RECORDS["step2_process"] | change).encode()
    words, files = ["--train_data", "DIR/bad.jsonl"], {"bad.jsonl": record}
    check_refusal("step2_process", words, ["DIR/bad.jsonl:1: ", part], models, tmp_path, files)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"score": "good"}, "field 'score' is 'good'; it must be a number"),
        ({"score": None}, "field 'score' is missing (a scored response has"),
        ({"score": -1e39}, "field 'score' is -1e+39; allowed: -1e+06 to 1e+06"),
        ({"response": ""}, "field 'response' is empty"),
        ({"response": [{"role": "user", "content": "b"}]}, "'prompt' is not one of the user messages"),
    ],
)
def test_scored_responses_are_refused(models: Path, tmp_path: Path, change: dict, part: str) -> None:
    record = json.dumps(RECORDS["step2_ilql"] | change).encode()
    words, files = ["--train_data", "DIR/bad.jsonl"], {"bad.jsonl": record}
    check_refusal("step2_ilql", words, ["DIR/bad.jsonl:1: ", part], models, tmp_path, files)


@pytest.mark.parametrize("weight", ["nan", "inf", "-1", "0", "1e999", "101", "0.1:0.2", "", "x"])
def test_weight_of_a_source_is_refused(models: Path, tmp_path: Path, weight: str) -> None:
    command = EVERY[len(weight) % len(EVERY)]
    words = [f"--{DATA[command]}", f"DIR/good.jsonl:{weight}"]
    check_refusal(command, words, f"DIR/good.jsonl:{weight}: ", models, tmp_path)

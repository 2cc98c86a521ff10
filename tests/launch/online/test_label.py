"""Pairs labelled by a function: the higher score wins, ties are left out, and mistakes are one line."""

import json
from pathlib import Path

import pytest

from common.data.records import read_all
from common.text.record_formats import normalise_record
from tests.ranks import run_stage

FUNCTIONS = """
def length(prompts, responses, records):
    assert all(record["prompt"] == prompt for prompt, record in zip(prompts, records, strict=True))
    return [len(response) for response in responses]

def alike(prompts, responses, records):
    return [1] * len(responses)
"""
PAIRS = [
    {"prompt": [{"role": "user", "content": "one"}], "response_a": "a", "response_b": "bcd"},
    {"prompt": "two", "response_a": "long one", "response_b": "short", "response_a_ended": False},
    {"prompt": "three", "response_a": "xy", "response_b": "yx"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rules.py").write_text(FUNCTIONS)
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS))
    return tmp_path


def words(folder: Path, function: str) -> list[str]:
    files = ["--pair_data", str(folder / "pairs.jsonl"), "--output", str(folder / "out.jsonl")]
    return ["--gold_function", f"{folder}/{function}", *files]


@pytest.mark.parametrize(
    ("function", "best"), [("length", ["bcd", "long one"]), ("length:-2", ["a", "short"])]
)
def test_the_higher_score_wins(folder: Path, function: str, best: list[str]) -> None:
    """Also with a negative weight. Step 2 reads the result, and the fields of the pair are still there."""
    result = run_stage("launch.online.label", words(folder, f"rules.py:{function}"), folder / "logs")
    assert result.codes == [0] and "2 pairs; 1 of equal score left out" in result.output, result.output
    parsed, _ = read_all([str(folder / "out.jsonl")], normalise_record)
    assert [record["chosen"] for record in parsed] == best
    labelled = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in one.items() if k != "preference"} for one in labelled] == PAIRS[:2]


@pytest.mark.parametrize(
    ("function", "part"),
    [
        ("rules.py:alike", "alike: scores the responses of every pair alike"),
        ("rules.py:none", "has no function none"),
        ("no.py:length", "there is no file"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, function: str, part: str) -> None:
    result = run_stage("launch.online.label", words(folder, function), folder / "logs")
    (line,) = result.output.splitlines()
    assert result.codes == [2] and line.startswith("error: --gold_function") and part in line
    assert not (folder / "out.jsonl").exists()


def test_without_pairs_the_function_is_only_loaded(folder: Path) -> None:
    result = run_stage("launch.online.label", words(folder, "rules.py:alike")[:2], folder / "logs")
    assert result.codes == [0] and not result.output and not (folder / "out.jsonl").exists()

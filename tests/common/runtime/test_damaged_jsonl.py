"""Damaged JSON Lines: valid lines are read, and a resumed run appends complete lines."""

import json

from common.runtime.damaged_jsonl import read_lines, read_metrics, skipped_message
from common.training.metrics import MetricWriter


def test_other_lines_than_objects_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\n\n{"b": 1\n\xff\xfe\n[1]\n' + b"[" * 99_999 + b'\n{"c": NaN}'
    )
    lines = read_lines(path)
    assert [(number, *record) for number, record in lines.records] == [(1, "a"), (7, "c")]
    assert lines.records[0][1]["a"] == "\u2028"
    assert lines.skipped == [3, 4, 5, 6]
    assert skipped_message(path, [4], "odd") == [f"{path}: skipped 1 line odd (first: line 4)."]
    assert skipped_message(path, [], "odd") == [] and read_lines(tmp_path / "none") == ([], [])


def test_metrics_are_finite_numbers_or_none_sorted_by_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "a": 1}\n{"step": 1, "a": Infinity, "b": "x", "c": true}\n{"a": 2}\n')
    lines, problems = read_metrics(path)
    assert lines == [{"step": 1, "a": None}, {"step": 2, "a": 1.0}]
    assert problems == [
        f"{path}: skipped 1 line without a step (first: line 3).",
        f"{path}: skipped 2 values that are not numbers (b in line 2).",
    ]


def test_resumed_run_drops_damaged_lines(tmp_path):
    """Invalid bytes, a line without a step and an unfinished last line do not damage later lines."""
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n{"a": 1}\n{"step": 3}\n{"step": 2}')
    MetricWriter(str(tmp_path), 2, 5, 1).samples(3, [{"text": "\u2028"}])
    steps = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert steps == [{"step": 1}, {"step": 2}, {"step": 3, "text": "\u2028"}]

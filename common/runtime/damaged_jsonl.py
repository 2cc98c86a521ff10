"""Read JSON Lines files that may be damaged, and report the lines that are skipped."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
LARGEST = 1e100  # no run logs a larger number


class Lines(NamedTuple):
    """JSON objects with their line numbers, and the line numbers that were skipped."""

    records: list[tuple[int, Record]]
    skipped: list[int]


def read_lines(path: Path) -> Lines:
    """Read all JSON objects of a file. Ignores blank lines; a missing file is empty. Raises OSError."""
    content = path.read_bytes() if path.is_file() else b""
    records, skipped = [], []
    # `splitlines` would also split at other characters, such as U+2028 in a text.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append((number, record))
        else:
            skipped.append(number)
    return Lines(records, skipped)


def skipped_message(path: Path, skipped: list[int], what: str) -> list[str]:
    """A list with one sentence about the skipped lines; empty if no line was skipped."""
    if not skipped:
        return []
    lines = "1 line" if len(skipped) == 1 else f"{len(skipped)} lines"
    return [f"{path}: skipped {lines} {what} (first: line {skipped[0]})."]


def read_metrics(path: Path) -> tuple[list[Record], list[str]]:
    """Read metrics.jsonl, sorted by step. Also returns one sentence per kind of skipped content."""
    records, damaged = read_lines(path)
    lines, without_step, bad_values = [], [], []
    for number, record in records:
        if not is_step(record.get("step")):
            without_step.append(number)
            continue
        line: Record = {"step": record.pop("step")}
        for name, value in record.items():
            if value is None or is_number(value):
                line[name] = float(value) if value is not None and math.isfinite(value) else None
            else:
                bad_values.append(f"{name} in line {number}")
        lines.append(line)
    problems = skipped_message(path, damaged, "without a JSON object")
    problems += skipped_message(path, without_step, "without a step")
    if bad_values:
        problems.append(f"{path}: skipped {len(bad_values)} values that are not numbers ({bad_values[0]}).")
    return sorted(lines, key=lambda line: line["step"]), problems


def is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_number(value: Any) -> bool:
    """Whether the value is a number, and if it is finite, one that sums and squares do not make infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST or abs(value) == math.inf or value != value

"""JSON Lines files that may be damaged: the records that can be read, and the lines that cannot."""

import json
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


class Lines(NamedTuple):
    """JSON objects with their line numbers, and the numbers of the lines that hold none."""

    records: list[tuple[int, Record]]
    skipped: list[int]


def read_lines(path: Path) -> Lines:
    """All objects of a file; blank lines do not count, and a missing file has no lines. Raises OSError."""
    content = path.read_bytes() if path.is_file() else b""
    records, skipped = [], []
    # Not `splitlines`: texts may hold other characters that it takes for the end of a line.
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


def in_words(path: Path, skipped: list[int], what: str) -> list[str]:
    """A sentence about skipped lines, in a list that is empty when there are none."""
    if not skipped:
        return []
    lines = "1 line" if len(skipped) == 1 else f"{len(skipped)} lines"
    return [f"{path}: skipped {lines} {what} (first: line {skipped[0]})."]

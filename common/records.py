"""Sources of data: files, folders and hub datasets, record by record, each with its place and its weight."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.formatting import Message
from common.options import UserError
from common.shapes import recognise

Record = dict[str, Any]
KINDS = (".jsonl", ".json", ".csv", ".parquet")


class Source(NamedTuple):
    """A file, folder or hub dataset, and how often its records are seen per epoch."""

    name: str
    weight: float


class SourcedRecord(NamedTuple):
    """A record, or the line that is to be one, and where it stands, as `file:line`, for messages."""

    source: Source
    origin: str
    record: Record | str


def parse_source(text: str) -> Source:
    """`NAME` or `NAME:WEIGHT`; UserError for a weight that is not above 0."""
    weighted = re.fullmatch(r"(.+):(\d*\.?\d+)", text)
    if weighted is None:
        return Source(text, 1.0)
    if float(weighted[2]) == 0:
        raise UserError(f"{text}: the weight after the colon must be above 0")
    return Source(weighted[1], float(weighted[2]))


def read_records(sources: Sequence[str]) -> Iterator[SourcedRecord]:
    """All records of files, folders of files, or hub datasets, in order; lines are not parsed yet.

    Raises UserError for a missing or unreadable file.
    """
    for source in map(parse_source, sources):
        for name in _files_of(source.name):
            records = _read_jsonl(Path(name)) if name.endswith(".jsonl") else _read_with_datasets(name)
            for origin, record in records:
                yield SourcedRecord(source, origin, record)


def parse_record(record: Record | str) -> Record:
    """A record in a documented shape. Raises ValueError, in words for the user."""
    if isinstance(record, dict):
        return recognise(record)
    try:
        parsed = json.loads(record)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"must be a JSON object, not {type(parsed).__name__}")
    return recognise(parsed)


def fraction(prompt: str | list[Message], purpose: str) -> float:
    """A number in [0, 1) that depends on the prompt and the purpose alone."""
    text = purpose + json.dumps(prompt, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _files_of(name: str) -> list[str]:
    """The data files of a folder, in order of their names; anything else is what it is."""
    path = Path(name)
    if path.is_dir():
        files = sorted(str(file) for file in path.iterdir() if file.suffix in KINDS)
        if not files:
            raise UserError(f"{name}: a folder without data files; allowed: {' '.join(KINDS)}")
        return files
    if path.suffix[1:].isalpha() and path.suffix in KINDS and not path.exists():
        raise UserError(f"{name}: No such file")
    if path.suffix not in KINDS and (path.exists() or path.suffix[1:].isalpha()):
        raise UserError(f"{name}: unknown kind of data file; allowed: {' '.join(KINDS)} or a hub name")
    return [name]


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record | str]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason}") from None


def _read_with_datasets(source: str) -> Iterator[tuple[str, Record | str]]:
    """Records through `datasets`, which is imported here because most runs on JSONL never need it."""
    import datasets

    datasets.disable_progress_bars()
    try:
        kind = Path(source).suffix
        if kind in KINDS:
            rows = datasets.load_dataset(kind[1:], data_files=source, split="train")
        else:
            rows = datasets.load_dataset(source, split="train")
    except Exception as error:  # noqa: BLE001 - its loaders raise anything; the user needs the reason, not the type
        raise UserError(f"{source}: {str(error).strip().splitlines()[0]}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{source}: row {number}", {k: v for k, v in row.items() if v is not None}

"""Sources of data: files, folders and hub datasets, record by record, each with its place and its weight."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.conversation import Message
from common.files import sha256
from common.options import UserError, reason
from common.shapes import recognise

Record = dict[str, Any]
KINDS = (".jsonl", ".json", ".csv", ".parquet")
CLICKS = ".clicks.jsonl"  # what raters did, beside the file of records that is made of it


class Source(NamedTuple):
    """A file, folder or hub dataset, and how often its records are seen per epoch."""

    name: str
    weight: float


class SourcedRecord(NamedTuple):
    """A record, or the line that is to be one, and where it stands, as `file:line`, for messages."""

    source: Source
    origin: str
    record: Record | bytes


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
        for name in files_of(source.name):
            for number, _, unparsed in read_source(name):
                yield SourcedRecord(source, origin(name, number), unparsed)


def parse_all(sources: Sequence[str]) -> tuple[list[str], list[Record]]:
    """Where each record of small data stands, and the record. Raises UserError for a bad one."""
    origins, records = [], []
    for _, place, unparsed in read_records(sources):
        try:
            records.append(parse_record(unparsed))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        origins.append(place)
    return origins, records


def read_source(name: str) -> Iterator[tuple[int, float, Record | bytes]]:
    """Each record of a file or hub dataset: its number from 1, the share that is read with it, itself.

    Lines of JSONL are not parsed yet. Raises UserError for a missing or unreadable file.
    """
    yield from _read_jsonl(Path(name)) if name.endswith(".jsonl") else _read_with_datasets(name)


def origin(name: str, number: int) -> str:
    """Where a record stands, for messages."""
    return f"{name}:{number}" if name.endswith(".jsonl") else f"{name}: row {number}"


def content_of(name: str) -> str:
    """What tells the content of a file or hub dataset from any other. Raises UserError as `read_source`."""
    try:
        return sha256(Path(name)) if Path(name).suffix in KINDS else _load_dataset(name)._fingerprint
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None


def parse_record(record: Record | bytes) -> Record:
    """A record in a documented shape. Raises ValueError, in words for the user."""
    return recognise(parse_object(record))


def parse_object(record: Record | bytes) -> Record:
    """A record in whatever shape it has. Raises ValueError, in words for the user."""
    if isinstance(record, dict):
        return record
    try:
        parsed = json.loads(record.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"must be a JSON object, not {type(parsed).__name__}")
    return parsed


def fraction(content: str | list[Message] | Record, purpose: str) -> float:
    """A number in [0, 1) that depends on the content, a prompt or a record, and the purpose alone."""
    text = purpose + json.dumps(content, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def files_of(name: str) -> list[str]:
    """The data files of a folder, in order of their names, but for clicks; anything else is what it is."""
    path = Path(name)
    if path.is_dir():
        files = [str(file) for file in path.iterdir() if file.suffix in KINDS]
        files = sorted(file for file in files if not file.endswith(CLICKS))
        if not files:
            raise UserError(f"{name}: a folder without data files; allowed: {' '.join(KINDS)}")
        return files
    if path.suffix[1:].isalpha() and path.suffix in KINDS and not path.exists():
        raise UserError(f"{name}: No such file")
    if path.suffix not in KINDS and (path.exists() or path.suffix[1:].isalpha()):
        raise UserError(f"{name}: unknown kind of data file; allowed: {' '.join(KINDS)} or a hub name")
    return [name]


def _read_jsonl(path: Path) -> Iterator[tuple[int, float, Record | bytes]]:
    try:
        size, done = path.stat().st_size, 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                done += len(line)
                if line.strip():
                    yield number, done / size, line
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _read_with_datasets(name: str) -> Iterator[tuple[int, float, Record | bytes]]:
    rows = _load_dataset(name)
    for number, row in enumerate(rows, start=1):
        yield number, number / len(rows), {k: v for k, v in row.items() if v is not None}


def _load_dataset(name: str) -> Any:
    """Through `datasets`, which is imported here because most runs on JSONL never need it."""
    import datasets

    datasets.disable_progress_bars()
    kind = Path(name).suffix
    try:
        if kind in KINDS:
            return datasets.load_dataset(kind[1:], data_files=name, split="train")
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # noqa: BLE001 - its loaders raise anything; the user needs the reason, not the type
        raise UserError(f"{name}: {reason(error)}") from None

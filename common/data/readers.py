"""Read records from data files and hub datasets. Text stays text, and a path is never a pattern."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.data.sources import KINDS, hub_reason, kind_of, parse_source
from common.runtime.files import sha256
from common.runtime.options import UserError, reason

# An unparsed line of JSONL, a value from another kind of file, or the error of a row.
Unparsed = bytes | Any | ValueError
Rows = Iterator[tuple[int, float, Unparsed]]  # number from 1, share of the file read so far, record

BATCH = 1000  # rows of Parquet in memory
SPACE = re.compile(r"\s*")
BETWEEN = re.compile(r"[\s,]*")  # between values of a JSON file without a list
COMMA = re.compile(r",\s*(?![\s\]])")  # between values of a list; not before its end


def read_source(name: str) -> Rows:
    """Yield the records of a file or hub dataset; lines of JSONL are not parsed.

    Raises UserError for a missing or unreadable file.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if kind_of(name) not in KINDS:
        yield from _read_hub(name)
        return
    try:
        yield from readers[kind_of(name)](Path(name))
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or reason(error)}") from None


def origin(name: str, number: int) -> str:
    """File and line of a record, for messages."""
    return f"{name}:{number}" if kind_of(name) == ".jsonl" else f"{name}: row {number}"


def content_hash(name: str) -> str:
    """Hash of the content of a file or hub dataset. Raises UserError like `read_source`."""
    try:
        return sha256(Path(name)) if kind_of(name) in KINDS else load_hub_dataset(name)._fingerprint
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None


@lru_cache(maxsize=1)
def load_hub_dataset(name: str) -> Any:
    """Load a split of a hub dataset, named as by `files_of`. Raises UserError with the reason."""
    import datasets  # imported here, because most runs do not need them
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # would print a warning for each retry
    source = parse_source(name)
    try:
        return datasets.load_dataset(source.name, source.config or None, split=source.split)
    except Exception as error:  # noqa: BLE001 - its loaders raise anything; the user needs the reason
        raise UserError(f"{name}: {hub_reason(error)}") from None


def _read_jsonl(path: Path) -> Rows:
    size, done = path.stat().st_size, 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            done += len(line)
            if line.strip():
                yield number, done / size, line


def _read_json(path: Path) -> Rows:
    """Read one list, or a sequence of values with or without line breaks."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason}") from None
    decoder, index, number = json.JSONDecoder(), SPACE.match(text).end(), 0
    is_list = text[index : index + 1] == "["
    index = SPACE.match(text, index + is_list).end()
    while index < len(text) and not (is_list and text[index] == "]"):
        try:
            value, index = decoder.raw_decode(text, index)
            index = _next_element(text, index) if is_list else BETWEEN.match(text, index).end()
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise UserError(f"{path}: not valid JSON: {error.msg} ({where})") from None
        except (ValueError, RecursionError) as error:  # a number too long, or nesting too deep, for Python
            raise UserError(f"{path}: row {number + 1}: {reason(error)}") from None
        number += 1
        yield number, index / len(text), value
    if is_list and text[index:].strip() != "]":
        what = "the list has no end" if index >= len(text) else "text after the end of the list"
        raise UserError(f"{path}: not valid JSON: {what}")


def _next_element(text: str, index: int) -> int:
    """Index of the next element of a list, or of the end of the list. Raises JSONDecodeError."""
    index = SPACE.match(text, index).end()
    if text[index : index + 1] in ("", "]"):
        return index
    if comma := COMMA.match(text, index):
        return comma.end()
    raise json.JSONDecodeError("Expecting one comma and another value, or the end of the list", text, index)


def _read_csv(path: Path) -> Rows:
    """Read rows as text by column name. Empty cells are absent fields, because CSV has no null."""
    csv.field_size_limit(sys.maxsize)
    size = path.stat().st_size
    # Bytes that are not UTF-8 become surrogates, so that the error can name the row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        number = 0
        try:
            names = _column_names(path, next(filter(None, rows), []))
            for number, cells in enumerate(filter(None, rows), start=1):
                yield number, file.buffer.tell() / size, _row(names, cells)
        except csv.Error as error:
            raise UserError(f"{path}: row {number + 1}, line {rows.line_num}: {error}") from None


def _column_names(path: Path, header: list[str]) -> list[str]:
    """Check the header. Only the first name may be empty: pandas writes row numbers without a name."""
    names = [name.strip() for name in header]
    if not _is_text(names):
        raise UserError(f"{path}: header: not UTF-8 text; save the file as UTF-8")
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"{path}: header: duplicate column {min(duplicates)!r}; each column needs its own name"
        )
    if "" in names[1:]:
        raise UserError(f"{path}: header: column {names.index('', 1) + 1} has no name")
    if len(names) == 1 and (separators := set(names[0]) & set(";\t|")):
        raise UserError(
            f"{path}: header: one column, {names[0]!r}; columns must be separated by commas, not by"
            f" {min(separators)!r}"
        )
    return names


def _row(names: list[str], cells: list[str]) -> Unparsed:
    if len(cells) != len(names):
        return ValueError(f"has {len(cells)} cells, but the header has {len(names)} columns")
    if not _is_text(cells):
        return ValueError("not UTF-8 text")
    return {name: cell for name, cell in zip(names, cells, strict=True) if name and cell}


def _is_text(cells: list[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Rows:
    import pyarrow.parquet  # a dependency of `datasets`

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number, total = 0, file.metadata.num_rows
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, number / total, row
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - Arrow raises anything; the user needs the reason
        raise UserError(f"{path}: not readable as Parquet: {reason(error)}") from None


def _read_hub(name: str) -> Rows:
    rows = load_hub_dataset(name)
    for number, row in enumerate(rows, start=1):
        yield number, number / len(rows), row

"""Records of each kind of data file, one after the other, and of hub datasets. Nothing is guessed: text stays
text, and a path is a path, never a pattern.
"""

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

# A line of JSONL, not parsed yet; a value of another file; or what is wrong with the row.
Unparsed = bytes | Any | ValueError
Rows = Iterator[tuple[int, float, Unparsed]]  # number from 1, the share that is read with it, itself

BATCH = 1000  # rows of Parquet in memory
SPACE = re.compile(r"\s*")
BETWEEN = re.compile(r"[\s,]*")  # values of a JSON file that is no list
COMMA = re.compile(r",\s*(?![\s\]])")  # between values of a list; one is not enough for an end


def read_source(name: str) -> Rows:
    """Each record of a file, or of a hub dataset with its split; lines of JSONL are not parsed yet.

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
    """Where a record stands, for messages."""
    return f"{name}:{number}" if kind_of(name) == ".jsonl" else f"{name}: row {number}"


def content_of(name: str) -> str:
    """What tells the content of a file or hub dataset from any other. Raises UserError as `read_source`."""
    try:
        return sha256(Path(name)) if kind_of(name) in KINDS else load_hub_dataset(name)._fingerprint
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None


@lru_cache(maxsize=1)
def load_hub_dataset(name: str) -> Any:
    """One split of a hub dataset, as `files_of` names it. Raises UserError with the reason."""
    import datasets  # here, because most runs never need them
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # its retries, one warning each
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
    """The elements of one list, or values one after the other, be they on a line each or not."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason}") from None
    decoder, place, number = json.JSONDecoder(), SPACE.match(text).end(), 0
    is_list = text[place : place + 1] == "["
    place = SPACE.match(text, place + is_list).end()
    while place < len(text) and not (is_list and text[place] == "]"):
        try:
            value, place = decoder.raw_decode(text, place)
            place = _next_element(text, place) if is_list else BETWEEN.match(text, place).end()
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise UserError(f"{path}: not valid JSON: {error.msg} ({where})") from None
        except (ValueError, RecursionError) as error:  # a number or a nesting that is too much for Python
            raise UserError(f"{path}: row {number + 1}: {reason(error)}") from None
        number += 1
        yield number, place / len(text), value
    if is_list and text[place:].strip() != "]":
        what = "the list has no end" if place >= len(text) else "there is more behind the list"
        raise UserError(f"{path}: not valid JSON: {what}")


def _next_element(text: str, place: int) -> int:
    """Where the next element of a list begins, or the list's end. Raises JSONDecodeError."""
    place = SPACE.match(text, place).end()
    if text[place : place + 1] in ("", "]"):
        return place
    if comma := COMMA.match(text, place):
        return comma.end()
    raise json.JSONDecodeError("Expecting one comma and another value, or the end of the list", text, place)


def _read_csv(path: Path) -> Rows:
    """Rows as texts by the names in the header; an empty cell is an absent field, for CSV has no null."""
    csv.field_size_limit(sys.maxsize)
    size = path.stat().st_size
    # Bytes that are no UTF-8 become surrogates, which the record is then refused for, with its row.
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
    """Only the first name may be empty: pandas writes the numbers of rows under none."""
    names = [name.strip() for name in header]
    if not _is_text(names):
        raise UserError(f"{path}: header: not UTF-8 text; save the file as UTF-8")
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: header: {min(twice)!r} is there twice; each column needs its own name")
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
        return ValueError(f"has {len(cells)} cells, but the header has {len(names)} names")
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
    import pyarrow.parquet  # `datasets` brings it along

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number, total = 0, file.metadata.num_rows
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, number / total, row
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - what Arrow raises; the user needs the reason
        raise UserError(f"{path}: not readable as Parquet: {reason(error)}") from None


def _read_hub(name: str) -> Rows:
    rows = load_hub_dataset(name)
    for number, row in enumerate(rows, start=1):
        yield number, number / len(rows), row

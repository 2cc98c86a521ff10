"""Parse and check records, convert them to documented formats, and handle bad records."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from common.data.readers import Unparsed, origin, read_source
from common.data.sources import files_to_read, parse_source, repetitions
from common.runtime.distributed import log
from common.runtime.options import UserError, reason
from common.runtime.progress import ReadingProgress
from common.text.conversation import Message
from common.text.fields import check_characters, remove_nulls
from common.text.record_formats import Record, normalise_record
from common.text.segments import find_prompt

Parsed = TypeVar("Parsed")
LARGE_SHARE = 0.2  # of records left out or truncated: worth a warning
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # lone surrogates in UTF-8 files appear only as escapes


class BadRecords:
    """Handles all errors that a record causes, here or in a library.

    The first bad record raises UserError, or with `skip` bad records are counted.
    """

    def __init__(self, skip: bool) -> None:
        self.skip, self.count = skip, 0
        self.first: tuple[int, str] | None = None  # record number and error of the first bad record
        self.first_origin = ""  # file and line of the first bad record

    @contextlib.contextmanager
    def at(self, name: str, number: int) -> Iterator[None]:
        """Context in which record `number` of a file is processed."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - templates and tokenizers raise anything
            why = reason(error)
            if not isinstance(error, ValueError) and type(error).__name__ not in why:
                why = f"{type(error).__name__}: {why}"
            if not self.skip:
                raise UserError(f"{origin(name, number)}: {why}") from None
            self.count += 1
            self.first = self.first or (number, why)
            self.first_origin = self.first_origin or origin(name, number)

    def nothing_left(self, source: str, read: int, others: str = "") -> UserError:
        """Error for a source without usable records. others: why records that are not bad were left out."""
        bad = f"{self.count} bad, the first at {self.first_origin}: {self.first[1]}" if self.first else ""
        why = ", ".join(filter(None, (others, bad)))
        return UserError(f"{source}: no rows left: {read} records read{': ' * bool(why)}{why}")


def read_all(
    sources: Sequence[str], parse: Callable[[Record], Parsed], skip_bad_records: bool = False,
    is_training: bool = True,
) -> tuple[list[Parsed], int]:  # fmt: skip
    """Parse all records, repeated by weight. Returns the results and the number of bad records.

    parse: converts a record in any format; raises ValueError for a bad one. Raises UserError with file and
    line of a bad record, unless they are skipped, and if no record is left.
    """
    results, bad, read = [], BadRecords(skip_bad_records), 0
    for source in map(parse_source, sources):
        for name in files_to_read(source, is_training):
            progress = ReadingProgress(f"reading {name}")
            count, bad_before = 0, bad.count
            for count, (number, share, unparsed) in enumerate(read_source(name), start=1):
                read += 1
                with bad.at(name, number):
                    record = parse_object(unparsed)
                    result, times = parse(record), source.weight
                    if times != 1:  # pairs may not be rated yet
                        prompt = find_prompt(normalise_record({"preference": "tie", **record}))
                        times = repetitions(source.weight, fraction(prompt, "weight"))
                    results += [result] * int(times)
                progress.update(count, share)
            warn_of_left_out(bad.count - bad_before, count, f"records of {name}")
    if sources and not results:
        unused = read - bad.count
        others = f"{unused} left out by the weight of their source" if unused else ""
        raise bad.nothing_left(" ".join(sources), read, others)
    return results, bad.count


def warn_of_left_out(count: int, read: int, what: str = "records") -> bool:
    """Warn if a large share of the records is left out. Returns whether it warned."""
    is_large = count > LARGE_SHARE * read
    if is_large:
        log(f"warning: {count / read:.0%} of the {what} are left out")
    return is_large


def parse_record(record: Unparsed) -> Record:
    """Parse a record and convert it to a documented format. Raises ValueError with a message for the user."""
    return normalise_record(parse_object(record))


def parse_object(record: Unparsed) -> Record:
    """Parse a record in any format, without null fields. Raises ValueError with a message for the user."""
    return remove_nulls(load_object(record))


def load_object(record: Unparsed) -> Record:
    """Parse a record, null fields included. Raises ValueError with a message for the user."""
    if isinstance(record, ValueError):
        raise record
    parsed = _parse_line(record) if isinstance(record, bytes) else record
    if not isinstance(parsed, dict):
        raise ValueError(f"must be a JSON object, not {type(parsed).__name__}")
    if not isinstance(record, bytes) or SURROGATE.search(record):
        check_characters(parsed)
    return parsed


def fraction(content: str | list[Message] | Record, purpose: str) -> float:
    """Hash a prompt or record to a number in [0, 1); each purpose has its own hash."""
    text = purpose + json.dumps(content, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason}") from None
    except RecursionError:
        raise ValueError("not usable JSON: objects or lists are nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not usable JSON: {reason(error)}") from None

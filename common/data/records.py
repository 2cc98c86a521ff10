"""Records: parsed, checked, in a documented shape; and what happens to a bad one."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from common.data.readers import Unparsed, origin, read_source
from common.data.sources import copies, files_to_read, parse_source
from common.runtime.distributed import log
from common.runtime.options import UserError, reason
from common.runtime.progress import ReadingProgress
from common.text.conversation import Message
from common.text.fields import check_characters, without_nulls
from common.text.record_formats import Record, recognise
from common.text.segments import find_prompt

Parsed = TypeVar("Parsed")
LARGE_SHARE = 0.2  # of what is read, left out or cut
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # the one way in which half a character comes in UTF-8


class BadRecords:
    """The one boundary of everything that a record makes us or a library raise.

    The first bad record ends the run with one line, unless they are to be skipped; then they are counted.
    """

    def __init__(self, skip: bool) -> None:
        self.skip, self.count = skip, 0
        self.first: tuple[int, str] | None = None  # its number, and what is wrong
        self.place = ""  # of the first, for people

    @contextlib.contextmanager
    def at(self, name: str, number: int) -> Iterator[None]:
        """Around all that is done with record `number` of a file."""
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
            self.first, self.place = self.first or (number, why), self.place or origin(name, number)

    def nothing_left(self, source: str, read: int, others: str = "") -> UserError:
        """The error when no record of a source is left; others: what became of those that are not bad."""
        bad = f"{self.count} bad, the first at {self.place}: {self.first[1]}" if self.first else ""
        why = ", ".join(filter(None, (others, bad)))
        return UserError(f"{source}: no rows left: {read} records read{': ' * bool(why)}{why}")


def read_all(
    sources: Sequence[str], parse: Callable[[Record], Parsed], skip_bad_records: bool = False,
    is_training: bool = True,
) -> tuple[list[Parsed], int]:  # fmt: skip
    """`parse` of each record, as often as the weight of its source says; and how many records are bad.

    parse: from a record in whatever shape it has; it raises ValueError for a bad one. Raises UserError naming
    file and line of it, unless they are skipped, and when no record is left.
    """
    found, bad, read = [], BadRecords(skip_bad_records), 0
    for source in map(parse_source, sources):
        for name in files_to_read(source, is_training):
            progress = ReadingProgress(f"reading {name}")
            count, bad_before = 0, bad.count
            for count, (number, share, unparsed) in enumerate(read_source(name), start=1):
                read += 1
                with bad.at(name, number):
                    record = parse_object(unparsed)
                    one, times = parse(record), source.weight
                    if times != 1:  # a pair may not have its answer yet
                        prompt = find_prompt(recognise({"preference": "tie", **record}))
                        times = copies(source.weight, fraction(prompt, "weight"))
                    found += [one] * int(times)
                progress.update(count, share)
            warn_of_left_out(bad.count - bad_before, count, f"records of {name}")
    if sources and not found:
        unseen = read - bad.count
        others = f"{unseen} left out by the weight of their source" if unseen else ""
        raise bad.nothing_left(" ".join(sources), read, others)
    return found, bad.count


def warn_of_left_out(count: int, read: int, what: str = "records") -> bool:
    """Warn where `count` of what was read is a large part of it; whether it is."""
    is_large = count > LARGE_SHARE * read
    if is_large:
        log(f"warning: {count / read:.0%} of the {what} are left out")
    return is_large


def parse_record(record: Unparsed) -> Record:
    """A record in a documented shape. Raises ValueError, in words for the user."""
    return recognise(parse_object(record))


def parse_object(record: Unparsed) -> Record:
    """A record in whatever shape it has, without null fields. Raises ValueError, in words for the user."""
    return without_nulls(load_object(record))


def load_object(record: Unparsed) -> Record:
    """A record exactly as it is in its file. Raises ValueError, in words for the user."""
    if isinstance(record, ValueError):
        raise record
    parsed = _parse_line(record) if isinstance(record, bytes) else record
    if not isinstance(parsed, dict):
        raise ValueError(f"must be a JSON object, not {type(parsed).__name__}")
    if not isinstance(record, bytes) or SURROGATE.search(record):
        check_characters(parsed)
    return parsed


def fraction(content: str | list[Message] | Record, purpose: str) -> float:
    """A number in [0, 1) that depends on the content, a prompt or a record, and the purpose alone."""
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

"""Held-out records as several models read them: the same ones for all."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from common.data.cache import Convert, Prepared, prepare
from common.data.columns import Row
from common.data.readers import origin, read_source
from common.data.records import fraction, parse_record
from common.data.rendering_report import describe_rendering, rendered
from common.data.sources import copies, files_to_read, parse_source
from common.data.summary import left_out, warn_of_few, warn_of_sources, why_empty
from common.runtime.distributed import log
from common.runtime.options import CacheOptions, UserError
from common.text.record_formats import Record
from common.text.segments import find_prompt


class Alike(NamedTuple):
    """Records that are a row to every converter."""

    origins: list[str]  # where each stands, for messages
    records: list[Record]
    rows: list[list[Row]]  # by converter


def load_alike(
    sources: Sequence[str], options: CacheOptions, row_class: type[Row], converts: Sequence[Convert],
    at_most: int = 0, is_training: bool = False,
) -> Alike:  # fmt: skip
    """Records that every converter keeps, as often as the weight of its source says.

    at_most: take the first so many; 0: all. Tokenised through the cache (see `prepare`). Raises
    UserError for a bad record, and when none is left.
    """
    found, first, shared, used = Alike([], [], [[] for _ in converts]), [], 0, []
    for source in map(parse_source, sources):
        for name in files_to_read(source, is_training):
            prepared = [prepare(name, options, row_class, convert) for convert in converts]
            first.append(prepared[0])
            numbers, fractions = _common_numbers(prepared)
            shared += len(numbers)
            numbers = np.repeat(numbers, copies(source.weight, fractions).astype(int))
            numbers = numbers[: at_most - len(found.records)] if at_most else numbers
            _extend(found, name, prepared, numbers)
            places = np.searchsorted(prepared[0].notes.column("number"), numbers)
            used += rendered(prepared[0], places)
    names = " ".join(sources)
    if not found.records:
        others = sum(len(one.notes.column("number")) for one in first) - shared
        raise UserError(f"{names}: no rows left: {why_empty(first, {'left out for another model': others})}")
    read, count, reasons = left_out(first)
    rest = f"; left out: {', '.join(reasons)}" if reasons else ""
    log(f"{names}: {len(found.records)} rows of {read} records{rest}")
    warn_of_sources(first)
    if not is_training:
        warn_of_few(fraction(find_prompt(record), "") for record in found.records)
    if encoder := getattr(converts[0], "keywords", {}).get("encoder"):
        describe_rendering(used, encoder, learns_replies=False)
    return found


def _common_numbers(prepared: Sequence[Prepared]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the records that are in all tables, and the fractions that a weight goes by."""
    numbers = [one.notes.column("number") for one in prepared]
    shared = reduce(np.intersect1d, numbers)
    return shared, prepared[0].notes.column("weight")[np.searchsorted(numbers[0], shared)]


def _extend(found: Alike, name: str, prepared: Sequence[Prepared], numbers: np.ndarray) -> None:
    wanted = set(numbers.tolist())
    records = {number: parse_record(line) for number, _, line in read_source(name) if number in wanted}
    for number in numbers.tolist():
        found.origins.append(origin(name, number))
        found.records.append(records[number])
    for rows, one in zip(found.rows, prepared, strict=True):
        rows += [one.rows[place] for place in np.searchsorted(one.notes.column("number"), numbers)]

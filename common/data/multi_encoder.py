"""Load the same held-out records for several tokenizers."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from common.data.cache import Convert, Prepared, prepare
from common.data.columns import Row
from common.data.readers import origin, read_source
from common.data.records import fraction, parse_record
from common.data.rendering_report import log_rendering, rendered
from common.data.sources import files_to_read, parse_source, repetitions
from common.data.summary import left_out, warn_of_few, warn_of_sources, why_empty
from common.runtime.distributed import log
from common.runtime.options import CacheOptions, UserError
from common.text.record_formats import Record
from common.text.segments import find_prompt


class SharedRecords(NamedTuple):
    """Records that all converters accept."""

    origins: list[str]  # file and line, for messages
    records: list[Record]
    rows: list[list[Row]]  # by converter


def load_shared_records(
    sources: Sequence[str], options: CacheOptions, row_class: type[Row], converts: Sequence[Convert],
    at_most: int = 0, is_training: bool = False,
) -> SharedRecords:  # fmt: skip
    """Load the records that all converters accept, repeated by weight, through the cache (see `prepare`).

    at_most: maximum number of records; 0: all. Raises UserError for a bad record and if none is left.
    """
    result, first, shared, used = SharedRecords([], [], [[] for _ in converts]), [], 0, []
    for source in map(parse_source, sources):
        for name in files_to_read(source, is_training):
            prepared = [prepare(name, options, row_class, convert) for convert in converts]
            first.append(prepared[0])
            numbers, fractions = _common_numbers(prepared)
            shared += len(numbers)
            numbers = np.repeat(numbers, repetitions(source.weight, fractions).astype(int))
            numbers = numbers[: at_most - len(result.records)] if at_most else numbers
            _extend(result, name, prepared, numbers)
            indices = np.searchsorted(prepared[0].notes.column("number"), numbers)
            used += rendered(prepared[0], indices)
    names = " ".join(sources)
    if not result.records:
        others = sum(len(source.notes.column("number")) for source in first) - shared
        raise UserError(f"{names}: no rows left: {why_empty(first, {'left out for another model': others})}")
    read, count, reasons = left_out(first)
    rest = f"; left out: {', '.join(reasons)}" if reasons else ""
    log(f"{names}: {len(result.records)} rows of {read} records{rest}")
    warn_of_sources(first)
    if not is_training:
        warn_of_few(fraction(find_prompt(record), "") for record in result.records)
    if encoder := getattr(converts[0], "keywords", {}).get("encoder"):
        log_rendering(used, encoder, trains_on_replies=False)
    return result


def _common_numbers(prepared: Sequence[Prepared]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the records in all tables, and their fractions for the weight of the source."""
    numbers = [table.notes.column("number") for table in prepared]
    shared = reduce(np.intersect1d, numbers)
    return shared, prepared[0].notes.column("weight")[np.searchsorted(numbers[0], shared)]


def _extend(result: SharedRecords, name: str, prepared: Sequence[Prepared], numbers: np.ndarray) -> None:
    wanted = set(numbers.tolist())
    records = {number: parse_record(line) for number, _, line in read_source(name) if number in wanted}
    for number in numbers.tolist():
        result.origins.append(origin(name, number))
        result.records.append(records[number])
    for rows, table in zip(result.rows, prepared, strict=True):
        rows += [table.rows[index] for index in np.searchsorted(table.notes.column("number"), numbers)]

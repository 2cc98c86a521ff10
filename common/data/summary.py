"""The table of what was found in the data, printed at the start of a run."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.data.cache import Prepared
from common.data.readers import origin
from common.data.records import LARGE_SHARE, warn_of_left_out
from common.runtime.distributed import log

if TYPE_CHECKING:
    from common.data.examples import Examples

FEW_PROMPTS = 32
COLUMNS = ("data", "rows", "tokens 5 %", "median", "95 %", "longest", "truncated", "duplicates")


def describe_data(sources: Sequence[Prepared], train: "Examples", held_out: "Examples") -> None:
    """Print what was read, used and dropped, how long it is, what it repeats; warn of a leak."""
    lines = [COLUMNS, _describe("training", train)]
    if len(held_out):
        lines.append(_describe("held out", held_out))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        log("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    read, count, reasons = left_out(sources)
    log(f"{read:,} records read, {count:,} left out{': ' * bool(reasons)}{', '.join(reasons)}")
    warn_of_sources(sources)
    for name, rows in (("training", train), ("held-out", held_out)):
        if len(rows) and (share := rows.notes("is_cut").mean()) > LARGE_SHARE:
            log(f"warning: {share:.0%} of the {name} rows are cut to the length limit")
    shared = np.isin(held_out.notes("held_out"), train.notes("held_out")).sum() if len(held_out) else 0
    if shared:
        log(
            f"warning: {shared:,} of {len(held_out):,} held-out prompts are in the training data too:"
            " what is measured on them is memory"
        )


def warn_of_sources(sources: Sequence[Prepared]) -> None:
    """Warn where a large part of the records is left out: of all, or else of one of the files."""
    read, count, _ = left_out(sources)
    if not warn_of_left_out(count, read):
        for source in sources:
            warn_of_left_out(left_out([source])[1], source.read, f"records of {source.name}")


def warn_of_few(prompts: Iterable[Hashable]) -> None:
    """Warn where evaluations are on so few different prompts that they say little."""
    different = set()
    for prompt in prompts:
        different.add(prompt)
        if len(different) == FEW_PROMPTS:
            return
    are = "prompt is" if len(different) == 1 else "prompts are"
    log(
        f"warning: {len(different)} {are} held out; on fewer than {FEW_PROMPTS}, evaluations are mostly noise"
    )


def why_empty(sources: Sequence[Prepared], elsewhere: Mapping[str, int]) -> str:
    """Where all records are: left out for a reason, or elsewhere, by the name of the place."""
    read, count, reasons = left_out(sources)
    by_weight = read - count - sum(elsewhere.values())
    placed = {**elsewhere, "left out by the weight of their source": by_weight}
    reasons += [f"{count:,} {place}" for place, count in placed.items() if count]
    return f"{read:,} records read{': ' * bool(reasons)}{', '.join(reasons)}"


def left_out(sources: Sequence[Prepared]) -> tuple[int, int, list[str]]:
    """Records read and left out, and the reasons, each with its number of records."""
    dropped = sum((Counter(source.dropped) for source in sources), Counter())
    bad = sum(source.bad for source in sources)
    reasons = [f"{count:,} {reason}" for reason, count in sorted(dropped.items())]
    if bad:
        name, (number, what) = next((s.name, s.first_bad) for s in sources if s.first_bad)
        reasons.append(f"{bad:,} bad, the first at {origin(name, number)}: {what}")
    return sum(source.read for source in sources), sum(dropped.values()) + bad, reasons


def _describe(name: str, examples: "Examples") -> tuple[str, ...]:
    lengths = np.percentile(examples.notes("length"), (5, 50, 95, 100)).astype(int)
    rows, records = examples.distinct_rows(), examples.notes("record")
    return (
        name,
        f"{len(examples):,}",
        *(f"{length:,}" for length in lengths),
        f"{examples.notes('is_cut').mean():.1%}",
        f"{rows - len(np.unique(records)):,}",
    )

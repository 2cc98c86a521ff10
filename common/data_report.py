"""The table of what was found in the data, printed at the start of a run."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.distributed import log
from common.prepare import Prepared

if TYPE_CHECKING:
    from common.data import Examples

COLUMNS = ("data", "rows", "tokens 5 %", "median", "95 %", "longest", "truncated", "duplicates")


def describe_data(sources: Sequence[Prepared], train: "Examples", held_out: "Examples") -> None:
    """Print what was read, used and dropped, how long it is, what it repeats; warn of a leak."""
    lines = [COLUMNS, _describe("training", train)]
    if len(held_out):
        lines.append(_describe("held out", held_out))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        log("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    dropped = sum((Counter(source.dropped) for source in sources), Counter())
    bad = sum(source.bad for source in sources)
    reasons = [f"{count:,} {reason}" for reason, count in sorted(dropped.items())]
    if bad:
        reasons.append(f"{bad:,} bad")
    read, left_out = sum(source.read for source in sources), sum(dropped.values()) + bad
    log(f"{read:,} records read, {left_out:,} left out{': ' * bool(reasons)}{', '.join(reasons)}")

    shared = np.isin(held_out.notes("held_out"), train.notes("held_out")).sum() if len(held_out) else 0
    if shared:
        log(
            f"warning: {shared:,} of {len(held_out):,} held-out prompts are in the training data too:"
            " what is measured on them is memory"
        )


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

"""Data summary at the start of a run: table, records left out, warnings."""

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
COLUMNS = ("data", "rows", "tokens: p5", "median", "p95", "longest", "truncated", "duplicates")


def log_data_summary(sources: Sequence[Prepared], train: "Examples", held_out: "Examples") -> None:
    """Log rows, lengths, duplicates and records left out. Warns of held-out prompts in the training data."""
    lines = [COLUMNS, _table_row("training", train)]
    if len(held_out):
        lines.append(_table_row("held out", held_out))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        log("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    read, count, reasons = left_out(sources)
    log(f"{read:,} records read, {count:,} left out{': ' * bool(reasons)}{', '.join(reasons)}")
    warn_of_sources(sources)
    for name, rows in (("training", train), ("held-out", held_out)):
        if len(rows) and (share := rows.notes("is_cut").mean()) > LARGE_SHARE:
            log(f"warning: {share:.0%} of the {name} rows are truncated to the length limit")
    shared = np.isin(held_out.notes("held_out"), train.notes("held_out")).sum() if len(held_out) else 0
    if shared:
        log(
            f"warning: {shared:,} of {len(held_out):,} held-out prompts are also in the training data:"
            " metrics on them measure memorisation"
        )


def warn_of_sources(sources: Sequence[Prepared]) -> None:
    """Warn if a large share of the records is left out, of all sources or of one file."""
    read, count, _ = left_out(sources)
    if not warn_of_left_out(count, read):
        for source in sources:
            warn_of_left_out(left_out([source])[1], source.read, f"records of {source.name}")


def warn_of_few(prompts: Iterable[Hashable]) -> None:
    """Warn if evaluations use too few distinct prompts to be reliable."""
    distinct = set()
    for prompt in prompts:
        distinct.add(prompt)
        if len(distinct) == FEW_PROMPTS:
            return
    noun = "prompt" if len(distinct) == 1 else "prompts"
    log(f"warning: only {len(distinct)} held-out {noun}; below {FEW_PROMPTS}, metrics are mostly noise")


def why_empty(sources: Sequence[Prepared], other_uses: Mapping[str, int]) -> str:
    """Why no record is left. other_uses: number of records by further reasons."""
    read, count, reasons = left_out(sources)
    by_weight = read - count - sum(other_uses.values())
    counts = {**other_uses, "left out by the weight of their source": by_weight}
    reasons += [f"{count:,} {reason}" for reason, count in counts.items() if count]
    return f"{read:,} records read{': ' * bool(reasons)}{', '.join(reasons)}"


def left_out(sources: Sequence[Prepared]) -> tuple[int, int, list[str]]:
    """Number of records read and left out, and the reasons with their counts."""
    dropped = sum((Counter(source.dropped) for source in sources), Counter())
    bad = sum(source.bad for source in sources)
    reasons = [f"{count:,} {reason}" for reason, count in sorted(dropped.items())]
    if bad:
        name, (number, what) = next((s.name, s.first_bad) for s in sources if s.first_bad)
        reasons.append(f"{bad:,} bad, the first at {origin(name, number)}: {what}")
    return sum(source.read for source in sources), sum(dropped.values()) + bad, reasons


def _table_row(name: str, examples: "Examples") -> tuple[str, ...]:
    lengths = np.percentile(examples.notes("length"), (5, 50, 95, 100)).astype(int)
    rows, records = examples.distinct_rows(), examples.notes("record")
    return (
        name,
        f"{len(examples):,}",
        *(f"{length:,}" for length in lengths),
        f"{examples.notes('is_cut').mean():.1%}",
        f"{rows - len(np.unique(records)):,}",
    )

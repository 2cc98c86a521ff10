"""Records to tokenised examples, the held-out part, and the order in which examples are seen."""

import math
from collections.abc import Sequence

import numpy as np

from common.data.batching import padding_share
from common.data.cache import Convert, Prepared, prepare
from common.data.columns import Row
from common.data.examples import Examples
from common.data.rendering_report import describe_rendering
from common.data.sources import copies, files_to_read, parse_source
from common.data.summary import describe_data, warn_of_few, why_empty
from common.runtime.distributed import log
from common.runtime.options import DataOptions, TrainOptions, UserError

LEARNT = {"is_trained", "is_response"}  # fields of rows in which every reply is learnt


def load_examples(
    sources: Sequence[str], options: DataOptions, row_class: type[Row], convert: Convert,
    is_training: bool = True,
) -> tuple[Examples[Row], list[Row]]:  # fmt: skip
    """Training and held-out examples, tokenised by `convert` (see `prepare`), with a table of what was found.

    is_training: see `files_of`. Without --eval_data, records are held out by a hash of their prompt, so that
    a prompt is never on both sides; in the same way --data_split gives each stage its part of the prompts.
    Raises UserError naming file and line for a bad record (unless --skip_bad_records), and when no rows are
    left.
    """
    begin, end = _stage_share(options)
    read, prepared = _load(sources, options, row_class, convert, is_training)
    ours = read.take((read.notes("stage") >= begin) & (read.notes("stage") < end))
    if options.eval_data:
        train = ours
        held_out, prepared_too = _load(options.eval_data, options, row_class, convert, is_training=False)
    else:
        is_held_out = ours.notes("held_out") < options.eval_fraction
        train, held_out, prepared_too = ours.take(~is_held_out), ours.take(is_held_out), []
    if not len(train):
        elsewhere = {
            "held out by --eval_fraction": 0 if options.eval_data else ours.distinct_rows(),
            "in the parts of other steps by --data_split": read.distinct_rows() - ours.distinct_rows(),
        }
        raise UserError(f"{' '.join(sources)}: no rows left: {why_empty(prepared, elsewhere)}")
    describe_data(prepared + prepared_too, train, held_out)
    if encoder := getattr(convert, "keywords", {}).get("encoder"):
        used = [*ours.rendered(), *(held_out.rendered() if options.eval_data else [])]
        describe_rendering(used, encoder, learns_replies=bool(LEARNT & {*row_class._fields}))
    if options.eval_data or options.eval_fraction:
        warn_of_few(held_out.notes("held_out")[: options.max_eval_samples or None].tolist())
    if isinstance(options, TrainOptions):
        log(f"{padding_share(train.notes('length'), options):.1%} padding in batches of like length")
    return train, list(held_out.take(slice(options.max_eval_samples or None)))


def _load(
    sources: Sequence[str], options: DataOptions, row_class: type[Row], convert: Convert, is_training: bool
) -> tuple[Examples[Row], list[Prepared]]:
    """Every row of the sources, as often as the source's weight says."""
    prepared: list[Prepared] = []
    rows = []
    for source in map(parse_source, sources):
        for name in files_to_read(source, is_training):
            prepared.append(prepare(name, options, row_class, convert))
            repeats = copies(source.weight, prepared[-1].notes.column("weight"))
            rows.append(np.repeat(np.arange(len(repeats)), repeats))
    numbers = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    return Examples(prepared, numbers, np.concatenate(rows)), prepared


def _stage_share(options: DataOptions) -> tuple[float, float]:
    """Where in [0, 1) the records of this stage lie, by --data_split."""
    if not options.data_split:
        return 0.0, 1.0
    try:
        parts = [float(part) for part in options.data_split.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or min(parts) < 0 or not 0 < parts[options.stage - 1] < math.inf:
        raise UserError(
            f"--data_split {options.data_split}: must be three numbers, the parts of steps 1, 2 and 3,"
            f" as in 2,4,4, and step {options.stage} needs one above 0"
        )
    before = sum(parts[: options.stage - 1])
    return before / sum(parts), (before + parts[options.stage - 1]) / sum(parts)

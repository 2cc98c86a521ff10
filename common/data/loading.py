"""Load, tokenise and split data into training and held-out examples."""

import math
from collections.abc import Sequence

import numpy as np

from common.data.batching import padding_share
from common.data.cache import Convert, Prepared, prepare
from common.data.columns import Row
from common.data.examples import Examples
from common.data.rendering_report import log_rendering
from common.data.sources import files_to_read, parse_source, repetitions
from common.data.summary import log_data_summary, warn_of_few, why_empty
from common.runtime.distributed import log
from common.runtime.options import DataOptions, TrainOptions, UserError

MASKS = {"is_trained", "is_response"}  # fields of rows that train on every reply


def load_examples(
    sources: Sequence[str], options: DataOptions, row_class: type[Row], convert: Convert,
    is_training: bool = True,
) -> tuple[Examples[Row], list[Row]]:  # fmt: skip
    """Load training and held-out examples, tokenised by `convert` (see `prepare`), and log a table of them.

    Without --eval_data, a hash of the prompt decides which records are held out, so no prompt is in both
    parts; --data_split selects the prompts of each stage in the same way. is_training: see `files_of`. Raises
    UserError for a bad record (unless --skip_bad_records) and if no rows are left.
    """
    begin, end = _stage_share(options)
    examples, prepared = _load(sources, options, row_class, convert, is_training)
    of_stage = examples.take((examples.notes("stage") >= begin) & (examples.notes("stage") < end))
    if options.eval_data:
        train = of_stage
        held_out, prepared_eval = _load(options.eval_data, options, row_class, convert, is_training=False)
    else:
        is_held_out = of_stage.notes("held_out") < options.eval_fraction
        train, held_out, prepared_eval = of_stage.take(~is_held_out), of_stage.take(is_held_out), []
    if not len(train):
        other_uses = {
            "held out by --eval_fraction": 0 if options.eval_data else of_stage.distinct_rows(),
            "used by other steps (--data_split)": examples.distinct_rows() - of_stage.distinct_rows(),
        }
        raise UserError(f"{' '.join(sources)}: no rows left: {why_empty(prepared, other_uses)}")
    log_data_summary(prepared + prepared_eval, train, held_out)
    if encoder := getattr(convert, "keywords", {}).get("encoder"):
        used = [*of_stage.rendered(), *(held_out.rendered() if options.eval_data else [])]
        log_rendering(used, encoder, trains_on_replies=bool(MASKS & {*row_class._fields}))
    if options.eval_data or options.eval_fraction:
        warn_of_few(held_out.notes("held_out")[: options.max_eval_samples or None].tolist())
    if isinstance(options, TrainOptions):
        log(f"{padding_share(train.notes('length'), options):.1%} padding in batches of similar length")
    return train, list(held_out.take(slice(options.max_eval_samples or None)))


def _load(
    sources: Sequence[str], options: DataOptions, row_class: type[Row], convert: Convert, is_training: bool
) -> tuple[Examples[Row], list[Prepared]]:
    """Load all rows of the sources, repeated by weight."""
    prepared: list[Prepared] = []
    rows = []
    for source in map(parse_source, sources):
        for name in files_to_read(source, is_training):
            prepared.append(prepare(name, options, row_class, convert))
            repeats = repetitions(source.weight, prepared[-1].notes.column("weight"))
            rows.append(np.repeat(np.arange(len(repeats)), repeats))
    numbers = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    return Examples(prepared, numbers, np.concatenate(rows)), prepared


def _stage_share(options: DataOptions) -> tuple[float, float]:
    """Interval of [0, 1) that belongs to this stage, from --data_split."""
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

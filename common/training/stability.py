"""Non-finite numbers and loss spikes."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from common.runtime.distributed import log
from common.runtime.options import RunOptions, UserError
from common.training.checkpoint import list_checkpoints
from common.training.train_state import TrainState

WINDOW = 32  # earlier losses that a new one is compared with
MIN_LOSSES = 8  # no spikes are reported before this many
SHOWN_RECORDS = 8


def check_numbers(
    state: TrainState, options: RunOptions, skipped: int, loss: float, origins: Sequence[str]
) -> None:
    """Count the skipped updates of a step, and log a loss spike.

    skipped: updates of the step with a non-finite loss or gradient norm; origins: the records of its batch.
    Raises UserError after --max_skipped_steps steps in a row with skipped updates.
    """
    state.skipped += skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    if skipped:
        records = ", ".join(origins[:SHOWN_RECORDS]) + (", ..." if len(origins) > SHOWN_RECORDS else "")
        log(f"step {state.step}: non-finite loss or gradient, updates skipped: {skipped}; records: {records}")
        if state.skipped_in_a_row >= options.max_skipped_steps:
            complete = list_checkpoints(Path(options.output_dir))
            raise UserError(
                f"step {state.step}: non-finite loss or gradients in {state.skipped_in_a_row} steps in a row"
                f" (--max_skipped_steps); last records: {records}; last checkpoint:"
                f" {complete[-1] if complete else 'none'}"
            )
    if not math.isfinite(loss):
        return
    if len(state.losses) >= MIN_LOSSES:
        mean, std = statistics.fmean(state.losses), statistics.pstdev(state.losses)
        if loss > mean + 6 * std and loss > 1.3 * mean:
            log(f"step {state.step}: loss spike: {loss:.4g}, after {mean:.4g} +/- {std:.2g}")
    state.losses = [*state.losses, loss][-WINDOW:]

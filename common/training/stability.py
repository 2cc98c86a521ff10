"""Numbers that are not finite, and losses that jump."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from common.runtime.distributed import log
from common.runtime.options import RunOptions, UserError
from common.training.checkpoint import list_checkpoints
from common.training.train_state import TrainState

REMEMBERED = 32  # losses that a new one is compared with
FEWEST = 8  # of them, before anything is called a spike
SHOWN_RECORDS = 8


def check_numbers(
    state: TrainState, options: RunOptions, skipped: int, loss: float, origins: Sequence[str]
) -> None:
    """Count the updates that a finished step left out, and log a loss far above those before it.

    skipped: updates of the step whose loss or gradient norm was not finite; origins: the records of its
    batch. Raises UserError after --max_skipped_steps such steps in a row.
    """
    state.skipped += skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    if skipped:
        records = ", ".join(origins[:SHOWN_RECORDS]) + (", ..." if len(origins) > SHOWN_RECORDS else "")
        log(f"step {state.step}: numbers not finite, updates skipped: {skipped}; records: {records}")
        if state.skipped_in_a_row >= options.max_skipped_steps:
            complete = list_checkpoints(Path(options.output_dir))
            raise UserError(
                f"step {state.step}: no finite numbers in {state.skipped_in_a_row} steps in a row"
                f" (--max_skipped_steps); the last records: {records}; the last good checkpoint:"
                f" {complete[-1] if complete else 'none'}"
            )
    if not math.isfinite(loss):
        return
    if len(state.losses) >= FEWEST:
        usual, spread = statistics.fmean(state.losses), statistics.pstdev(state.losses)
        if loss > usual + 6 * spread and loss > 1.3 * usual:
            log(f"step {state.step}: loss spike: {loss:.4g}, after {usual:.4g} +/- {spread:.2g}")
    state.losses = [*state.losses, loss][-REMEMBERED:]

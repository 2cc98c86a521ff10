"""Whether a training run has finished, from its lock, its last step, its options, and final/."""

import fcntl
import re
from pathlib import Path
from typing import NamedTuple

from launch.report.read import Run

TOTAL = re.compile(rb"step \d+/(\d+)")  # in the progress lines of train.log
TAIL = 1 << 16  # bytes at the end of train.log that are searched


class State(NamedTuple):
    """Whether all steps are done, and a sentence if not."""

    is_finished: bool
    text: str


def state_of(run: Run) -> State:
    """Finished, in progress, or stopped early."""
    last = max((line["step"] for line in run.lines), default=0)
    total = _total(run)
    at = f"step {last} of {total}" if total else f"step {last}"
    if _is_locked(run.folder):
        return State(False, f"The run is in progress, at {at}.")
    has_final = (run.folder / "final/config.json").is_file()
    if has_final and (not total or last >= total):
        return State(True, "")
    if has_final and run.options.get("early_stopping"):
        return State(True, f"Ended by --early_stopping {run.options['early_stopping']} at {at}.")
    why = "final/ is from an earlier end" if has_final else "final/ is missing"
    checkpoint = _newest_checkpoint(run.folder)
    saved = f"; the newest checkpoint is step {checkpoint}" if checkpoint else "; there is no checkpoint"
    resume = " Run the same command to resume." if checkpoint else ""
    return State(False, f"This run stopped at {at}; {why}{saved}.{resume}")


def _total(run: Run) -> int:
    """Total steps of the run; 0 if neither options nor train.log have them."""
    total = run.options.get("max_steps")
    if isinstance(total, int) and total > 0:
        return total
    try:
        with (run.folder / "train.log").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            totals = TOTAL.findall(file.read())
    except OSError:
        return 0
    return int(totals[-1][:15]) if totals else 0


def _newest_checkpoint(folder: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    files = (folder / "checkpoints").glob("step_*/state.json")
    steps = [int(match[1]) for file in files if (match := re.fullmatch(r"step_(\d{1,15})", file.parent.name))]
    return max(steps, default=0)


def _is_locked(folder: Path) -> bool:
    """Whether a process uses the folder now."""
    try:
        with (folder / "run.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False

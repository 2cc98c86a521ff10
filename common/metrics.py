"""One writer for all that a run reports: metrics.jsonl, TensorBoard, a progress line. Silent off rank 0."""

import contextlib
import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from common.distributed import log, rank
from common.files import write_text


class MetricWriter:
    """One JSON line per logged step in `output_dir/metrics.jsonl`, the same scalars in TensorBoard."""

    def __init__(self, output_dir: str, start_step: int, total_steps: int) -> None:
        self._path = Path(output_dir) / "metrics.jsonl"
        self._board_dir = Path(output_dir) / "tensorboard"
        self._board: Any = None
        self._start_step, self._total_steps = start_step, total_steps
        self._start_time = time.perf_counter()
        self._has_written = False
        self._pending = ""  # lines that a full disk has not taken

    def log(self, step: int, metrics: dict[str, float], shown: list[str]) -> None:
        """Write the metrics of a step, and show the named ones with the time that is left."""
        if rank() != 0:
            return
        metrics = {name: float(f"{value:.7g}") for name, value in metrics.items()}
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._pending += json.dumps({"step": step, **plain}) + "\n"
        values = " | ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
        log(f"step {step}/{self._total_steps} | {values} | ETA {self._time_left(step)}")
        try:
            self._write()
        except OSError as error:
            log(f"metrics of step {step} not written yet: {error}")
        try:
            board = self._tensorboard()
            for name, value in metrics.items():
                board.add_scalar(name, value, step)
            board.flush()
        except OSError:
            self._board = None  # its thread is dead; the next step opens another file

    def text(self, step: int, tag: str, text: str) -> None:
        """Put a text (Markdown) into TensorBoard."""
        if rank() == 0:
            with contextlib.suppress(OSError):
                self._tensorboard().add_text(tag, text, step)

    def _tensorboard(self) -> Any:
        if self._board is None:
            # Imported at the first use: it costs a second that a first step need not wait for.
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._board_dir), purge_step=self._start_step + 1)
        return self._board

    def _time_left(self, step: int) -> str:
        per_step = (time.perf_counter() - self._start_time) / max(step - self._start_step, 1)
        minutes, seconds = divmod(int(per_step * (self._total_steps - step)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"

    def _write(self) -> None:
        """Append what is pending, or nothing of it."""
        if not self._has_written:
            self._forget_after(self._start_step)
            self._has_written = True
        with self._path.open("ab") as file:
            end = file.tell()
            try:
                file.write(self._pending.encode())
                file.flush()
            except OSError:
                file.truncate(end)
                raise
        self._pending = ""

    def _forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run is about to repeat, and one that was cut off."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if step and line.endswith("}") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            write_text(self._path, "".join(f"{line}\n" for line in kept))


def peak_memory_gib() -> float:
    """Most memory this rank has held: on its GPU, or resident on the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

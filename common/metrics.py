"""One writer for all that a run reports: metrics.jsonl, TensorBoard, a progress line. Silent off rank 0."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from common.distributed import log, rank


class MetricWriter:
    """One JSON line per logged step in `output_dir/metrics.jsonl`, the same scalars in TensorBoard."""

    def __init__(self, output_dir: str, start_step: int, total_steps: int) -> None:
        self._path = Path(output_dir) / "metrics.jsonl"
        self._board_dir = Path(output_dir) / "tensorboard"
        self._board: Any = None
        self._start_step, self._total_steps = start_step, total_steps
        self._start_time = time.perf_counter()
        if rank() == 0:
            self._forget_after(start_step)

    def log(self, step: int, metrics: dict[str, float], shown: list[str]) -> None:
        """Write the metrics of a step, and show the named ones with the time that is left."""
        if rank() != 0:
            return
        metrics = {name: float(f"{value:.7g}") for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        board = self._tensorboard()
        for name, value in metrics.items():
            board.add_scalar(name, value, step)
        board.flush()
        values = " | ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
        log(f"step {step}/{self._total_steps} | {values} | ETA {self._time_left(step)}")

    def text(self, step: int, tag: str, text: str) -> None:
        """Put a text (Markdown) into TensorBoard."""
        if rank() == 0:
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

    def _forget_after(self, step: int) -> None:
        """Drop lines of steps that a resumed run is about to repeat."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if step and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            self._path.write_text("".join(f"{line}\n" for line in kept))


def peak_memory_gib() -> float:
    """Most memory this rank has held: on its GPU, or resident on the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

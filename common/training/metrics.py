"""Write metrics to metrics.jsonl, the trackers and the log, on rank 0; memory and FLOP metrics."""

import json
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.model.deepspeed_internals import full_size
from common.model.families import active_share, attention_widths
from common.runtime.damaged_jsonl import is_step, read_lines
from common.runtime.distributed import log, rank
from common.runtime.files import write_text
from common.runtime.options import world_size
from common.runtime.progress import clock
from common.training.means import Mean, StepMetrics, add_step, take_means
from common.training.report_to import Trackers
from common.training.train_state import TrainState

# Dense bf16 FLOP/s by the words of the GPU's name, from the data sheets.
PEAK_FLOPS = {
    "A100": 312e12, "A800": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12,
    "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12, "A40": 149.7e12,
    "A30": 165e12, "A10": 125e12,
}  # fmt: skip
_peak_bytes = 0  # of tensors on the GPU, before the last call of `phase_memory`


class MetricWriter:
    """One JSON line per logged step in `output_dir/metrics.jsonl`, the same scalars in the trackers."""

    def __init__(
        self, output_dir: str, start_step: int, total_steps: int, logging_steps: int,
        trackers: Trackers | None = None,
    ) -> None:  # fmt: skip
        self._metrics = _JsonLines(Path(output_dir) / "metrics.jsonl", start_step)
        self._samples = _JsonLines(Path(output_dir) / "samples.jsonl", start_step)
        self._trackers = trackers
        self._start_step, self._total_steps, self._logging_steps = start_step, total_steps, logging_steps
        self._start_time = time.monotonic()
        self._timed_steps, self._timed_seconds = -1, 0.0  # without the first step, which compiles

    def step(self, state: TrainState, metrics: StepMetrics, shown: list[str]) -> None:
        """Add a finished step to the means since the last line; write a line when it is due.

        A line is due every --logging_steps and after the last step. When training ends early, call `flush`.
        metrics: with `time/step` in seconds.
        """
        add_step(state.window, metrics)
        self._timed_steps += 1
        if self._timed_steps:
            self._timed_seconds += metrics["time/step"].total
        if state.step == self._total_steps or state.step % self._logging_steps == 0:
            self.flush(state, metrics, shown)

    def flush(self, state: TrainState, metrics: StepMetrics, shown: list[str]) -> None:
        """Write the means since the last line, if any step has finished since. metrics: of the last step."""
        if state.window:
            self.log(state.step, take_means(state.window, metrics), shown)

    def log(self, step: int, metrics: dict[str, float], shown: list[str]) -> None:
        """Write the metrics of a step; the progress line has the `shown` ones and the remaining time."""
        if rank() != 0:
            return
        metrics = {name: float(f"{value:.7g}") for name, value in metrics.items()}
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        values = " | ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
        log(f"step {step}/{self._total_steps} | {values} | {self._time(step)}")
        self._metrics.write([{"step": step, **plain}])
        if self._trackers:
            self._trackers.add(step, metrics)

    def text(self, step: int, tag: str, text: str) -> None:
        """Add a Markdown text to TensorBoard."""
        if self._trackers and rank() == 0:
            self._trackers.text(step, tag, text)

    def samples(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Append records to `output_dir/samples.jsonl`."""
        if rank() == 0:
            self._samples.write([{"step": step, **record} for record in records])

    def _time(self, step: int) -> str:
        """Remaining time; after the last step, the elapsed time of this process."""
        if step == self._total_steps:
            since = f" since step {self._start_step}" * bool(self._start_step)
            return f"elapsed {clock(time.monotonic() - self._start_time)}{since}"
        if self._timed_steps < 1:
            return "ETA ?"
        return f"ETA {clock(self._timed_seconds / self._timed_steps * (self._total_steps - step))}"


class _JsonLines:
    """A JSON Lines file of records with steps; a resumed run drops the records of later steps."""

    def __init__(self, path: Path, start_step: int) -> None:
        self._path, self._start_step = path, start_step
        self._is_trimmed = False
        self._pending = ""  # lines not written yet, because of a full disk

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Append the pending lines and the records; on a full disk, all stay pending."""
        self._pending += "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            if not self._is_trimmed:
                self._drop_after(self._start_step)
                self._is_trimmed = True
            with self._path.open("ab") as file:
                end = file.tell()
                try:
                    file.write(self._pending.encode())
                    file.flush()
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            log(f"{self._path} not written yet: {error}")
        else:
            self._pending = ""

    def _drop_after(self, step: int) -> None:
        """Drop lines of steps that the resumed run will repeat, and damaged lines."""
        content = self._path.read_bytes() if self._path.exists() else b""
        lines = content.split(b"\n")
        earlier = [
            lines[number - 1].decode()
            for number, record in read_lines(self._path).records
            if step and is_step(record.get("step")) and record["step"] <= step
        ]
        text = "".join(f"{line}\n" for line in earlier)
        if text.encode() != content:
            write_text(self._path, text)


def peak_memory_gib() -> float:
    """Peak memory of this rank: on its GPU, or resident host memory without a GPU."""
    if torch.cuda.is_available():
        return max(_peak_bytes, torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def phase_memory(phase: str = "") -> dict[str, float]:
    """Peaks of this rank's GPU since the last call, by name; nothing without a GPU.

    memory/allocated_gib: of tensors; memory/reserved_gib: with what the allocator keeps for new ones. phase:
    the end of the names.
    """
    global _peak_bytes
    if not torch.cuda.is_available():
        return {}
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    _peak_bytes = max(_peak_bytes, peaks["allocated"])
    torch.cuda.reset_peak_memory_stats()
    return {
        f"memory/{kind}_gib_{phase}" if phase else f"memory/{kind}_gib": peak / 2**30
        for kind, peak in peaks.items()
    }


class Phases:
    """Seconds and GPU memory of the phases of a step. Caches are emptied between them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory: dict[str, float] = {}
        self._start = time.perf_counter()

    def end(self, name: str) -> None:
        """End a phase; the next one begins."""
        self.memory |= phase_memory(name)
        torch.cuda.empty_cache()
        now = time.perf_counter()
        self.seconds.append(now - self._start)
        self._start = now


def training_flops(model: nn.Module, lengths: Sequence[int]) -> float:
    """Floating-point operations of one forward and backward pass over full sequences.

    lengths (B,) in tokens, without padding. A parameter counts 6 per token, a frozen one 4, because it has no
    gradient. Attention counts 12 x layers x heads x head size per token and token of the sequence, causal or
    not (Chowdhery et al. 2022, PaLM, appendix B). Embeddings and active experts count as parameters;
    recomputation does not count.
    """
    share, per_token = active_share(model.config), 0.0
    for name, p in model.named_parameters():
        size = full_size(p) * (2 if p.dtype == torch.uint8 else 1)  # 4-bit weights: two per byte
        size *= share if "experts." in name else 1
        per_token += size * (6 if p.requires_grad else 4)
    attention = 12 * sum(attention_widths(model.config)) * sum(length**2 for length in lengths)
    return float(per_token * sum(lengths) + attention)


def utilisation(flops: float, seconds: float) -> dict[str, Mean]:
    """train/mfu, model FLOPs utilisation: `flops` of all ranks in `seconds`, relative to the peak.

    The peak is always that of bf16. Empty if it is not known, as on the CPU.
    """
    peak = _peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {"train/mfu": Mean(flops, seconds * peak * world_size())} if peak else {}


def _peak_flops(device_name: str) -> float | None:
    words = set(device_name.replace("-", " ").split())
    if "MIG" in words:  # a part of a GPU
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if words >= set(name.split())), None)

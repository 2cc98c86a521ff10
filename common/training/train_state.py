"""State of a run besides its engines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.runtime.options import RunOptions, UserError
from common.training.means import Sums


@dataclass
class TrainState:
    """Everything besides the engines that a run needs to resume exactly.

    Random generators need no state: they are seeded by the seed and the step (`seed_everything`).
    """

    step: int = 0
    total_steps: int = 0  # planned at the last start
    epoch: float = 0.0
    samples: int = 0
    controllers: dict[str, float] = field(default_factory=dict)
    skipped: int = 0  # updates skipped because of non-finite numbers
    skipped_in_a_row: int = 0  # steps
    losses: list[float] = field(default_factory=list)  # of the last steps, to detect spikes
    best: float | None = None  # best value of --best_metric
    best_step: int | None = None
    evaluations_since_best: int = 0
    best_unwritten: bool = False  # stopped before best/ of this step was written
    unevaluated: bool = False  # the evaluation after this step has not run yet
    window: Sums = field(default_factory=dict)  # sums of metrics since the last logged line
    recent: dict[str, list[float]] = field(default_factory=dict)  # metrics of the last steps, for advice
    average: dict[str, Tensor] = field(default_factory=dict)  # EMA weights in fp32, on rank 0

    def plain(self) -> dict[str, Any]:
        """All fields except tensors, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "average"}

    def advance(self, samples: int, examples: int) -> None:
        """Count a finished step of `samples` from a data set of `examples`."""
        self.step += 1
        self.samples += samples
        self.epoch = self.samples / examples

    def is_best(self, metric: str, metrics: dict[str, float]) -> bool:
        """Record the metric of an evaluation; true if it is the best so far. Lower is better for losses."""
        if metric == "none":
            return False
        value = metrics[metric]
        self.evaluations_since_best += 1
        if not math.isfinite(value):
            return False
        if self.best is not None and (value >= self.best if metric.endswith("loss") else value <= self.best):
            return False
        self.best, self.best_step, self.evaluations_since_best = value, self.step, 0
        return True


def check_best_metric(options: RunOptions, held_out: Sequence[Any]) -> None:
    """Raise UserError when no held-out records exist for --best_metric."""
    if options.best_metric != "none" and not held_out:
        raise UserError(
            f"--best_metric {options.best_metric}: no held-out records; give --eval_data, or a larger"
            " --eval_fraction"
        )

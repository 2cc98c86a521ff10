"""What a run must remember besides its engines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.runtime.options import RunOptions, UserError
from common.training.means import Sums


@dataclass
class TrainState:
    """Everything besides the engines that a run needs to go on exactly where it was.

    Random numbers need no state: they are a function of the seed and the step (`seed_everything`).
    """

    step: int = 0
    total_steps: int = 0  # of the run, as planned when it was started the last time
    epoch: float = 0.0
    samples: int = 0
    controllers: dict[str, float] = field(default_factory=dict)
    skipped: int = 0  # updates left out because of numbers that are not finite
    skipped_in_a_row: int = 0  # steps
    losses: list[float] = field(default_factory=list)  # the last ones, to tell a spike
    best: float | None = None  # of --best_metric
    best_step: int | None = None
    evaluations_since_best: int = 0
    best_unwritten: bool = False  # a stop came before best/ of this step was written
    unevaluated: bool = False  # the evaluation after this step is still to be made
    window: Sums = field(default_factory=dict)  # figures since the last logged line
    recent: dict[str, list[float]] = field(default_factory=dict)  # metrics of the last steps, for advice
    average: dict[str, Tensor] = field(default_factory=dict)  # on rank 0: weights averaged over steps, fp32

    def plain(self) -> dict[str, Any]:
        """All but tensors, as JSON takes it."""
        return {name: value for name, value in vars(self).items() if name != "average"}

    def advance(self, samples: int, examples: int) -> None:
        """Count a finished step on `samples` of a data set of `examples`."""
        self.step += 1
        self.samples += samples
        self.epoch = self.samples / examples

    def is_best(self, metric: str, found: dict[str, float]) -> bool:
        """Note the metric of an evaluation; true when it is the best so far. Losses are better when lower."""
        if metric == "none":
            return False
        value = found[metric]
        self.evaluations_since_best += 1
        if not math.isfinite(value):
            return False
        if self.best is not None and (value >= self.best if metric.endswith("loss") else value <= self.best):
            return False
        self.best, self.best_step, self.evaluations_since_best = value, self.step, 0
        return True


def check_best_metric(options: RunOptions, held_out: Sequence[Any]) -> None:
    """Raise UserError when no record is held out to measure --best_metric on."""
    if options.best_metric != "none" and not held_out:
        raise UserError(
            f"--best_metric {options.best_metric}: no record is held out: give --eval_data, or a larger"
            " --eval_fraction"
        )

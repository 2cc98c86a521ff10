"""What a run must remember besides its engines."""

import math
from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Everything besides the engines that a run needs to go on exactly where it was.

    Random numbers need no state: they are a function of the seed and the step (`seed_everything`).
    """

    step: int = 0
    epoch: float = 0.0
    samples: int = 0
    controllers: dict[str, float] = field(default_factory=dict)
    skipped: int = 0  # updates left out because of numbers that are not finite
    skipped_in_a_row: int = 0  # steps
    losses: list[float] = field(default_factory=list)  # the last ones, to tell a spike
    best: float | None = None  # of --best_metric
    best_step: int | None = None

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
        if not math.isfinite(value):
            return False
        if self.best is not None and (value >= self.best if metric.endswith("loss") else value <= self.best):
            return False
        self.best, self.best_step = value, self.step
        return True

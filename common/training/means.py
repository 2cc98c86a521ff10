"""Average the metrics of training steps since the last logged line."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Mean(NamedTuple):
    """A step's contribution to a mean: a sum and its weight, in tokens, pairs, seconds or steps."""

    total: float
    weight: float = 1.0

    @property
    def value(self) -> float:
        """The mean of this step alone."""
        return self.total / self.weight if self.weight else math.nan


# Metrics of a step by name. A plain number, such as a learning rate, is not averaged.
StepMetrics = Mapping[str, Mean | float]
Sums = dict[str, list[float]]  # [total, weight] by name; plain lists, saved exactly in a checkpoint


def step_values(metrics: StepMetrics) -> dict[str, float]:
    """Values of one step's metrics."""
    return {name: f.value if isinstance(f, Mean) else f for name, f in metrics.items()}


def add_step(sums: Sums, metrics: StepMetrics) -> None:
    """Add a step's metrics to the sums since the last logged line.

    Non-finite values, as after a skipped update, and metrics without weight are left out of the mean.
    """
    for name, metric in metrics.items():
        if isinstance(metric, Mean) and metric.weight:
            total, weight = metric if math.isfinite(metric.total) else (0.0, 0.0)
            before = sums.get(name, [0.0, 0.0])
            sums[name] = [before[0] + float(total), before[1] + float(weight)]


def take_means(sums: Sums, metrics: StepMetrics) -> dict[str, float]:
    """Return the means since the last logged line and the plain numbers of this step; reset the sums.

    A metric without any finite value is NaN.
    """
    plain = {name: float(metric) for name, metric in metrics.items() if not isinstance(metric, Mean)}
    means = {name: Mean(*parts).value for name, parts in sums.items()}
    sums.clear()
    return means | plain

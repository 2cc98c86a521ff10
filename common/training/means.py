"""Figures of training steps as means since the last logged line."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Mean(NamedTuple):
    """A step's part of a mean: a sum, and what it is divided by: tokens, pairs, seconds or steps."""

    total: float
    weight: float = 1.0

    @property
    def value(self) -> float:
        """The mean of this step alone."""
        return self.total / self.weight if self.weight else math.nan


# Figures of a step by name. A plain number, such as a learning rate, is logged as it is at the step.
Figures = Mapping[str, Mean | float]
Sums = dict[str, list[float]]  # [total, weight] by name; plain lists, which a checkpoint keeps exactly


def step_values(figures: Figures) -> dict[str, float]:
    """The figures of one step."""
    return {name: f.value if isinstance(f, Mean) else f for name, f in figures.items()}


def add_step(sums: Sums, figures: Figures) -> None:
    """Add a step's figures to the sums since the last logged line.

    What is not finite, as after a skipped update, is left out of the mean, and so is a figure without weight.
    """
    for name, figure in figures.items():
        if isinstance(figure, Mean) and figure.weight:
            total, weight = figure if math.isfinite(figure.total) else (0.0, 0.0)
            before = sums.get(name, [0.0, 0.0])
            sums[name] = [before[0] + float(total), before[1] + float(weight)]


def take_means(sums: Sums, figures: Figures) -> dict[str, float]:
    """Means since the last logged line, and the plain numbers of this step; the sums begin anew.

    NaN where no step had a finite number.
    """
    plain = {name: float(figure) for name, figure in figures.items() if not isinstance(figure, Mean)}
    means = {name: Mean(*parts).value for name, parts in sums.items()}
    sums.clear()
    return means | plain

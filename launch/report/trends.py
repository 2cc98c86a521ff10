"""Start, end and peak of a noisy curve, and the noise of its change. Pure."""

import math
from collections.abc import Sequence
from statistics import fmean, median

Values = Sequence[float]

PARTS = 5  # start and end are means over a fifth of the curve, so that no single value decides
FEWEST = 5  # values needed to estimate noise
ERRORS = 3  # standard errors above which a change is not noise
LARGE_CHANGE = 0.25  # of held-out scores, as a share of their spread
LARGE_WITHOUT_SPREAD = 0.05  # as a share of their level, if the spread is unknown


def running_means(values: Values) -> list[float]:
    """Means over windows of a fifth of the values: (N,) -> (N - width + 1,)."""
    width = max(1, len(values) // PARTS)
    return [fmean(values[start : start + width]) for start in range(len(values) - width + 1)]


def ends(values: Values) -> tuple[float, float]:
    """Means over the first and the last fifth. NaN without values: comparisons with NaN are false."""
    means = running_means(values) if values else [math.nan]
    return means[0], means[-1]


def peak(values: Values) -> int:
    """Index of the highest running mean, at the middle of its window."""
    means = running_means(values)
    return means.index(max(means)) + (len(values) - len(means)) // 2


def error_of_change(values: Values) -> float:
    """Standard error of the difference of two running means, from the noise around the trend.

    The noise is estimated from the distance of each value to the mean of its neighbours (Gasser et al. 1986),
    which a linear trend does not change, by the median, which a few jumps do not change. Infinite for fewer
    than FEWEST values.
    """
    if len(values) < FEWEST:
        return math.inf
    bends = [abs((a + c) / 2 - b) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    noise = 1.4826 * median(bends) * math.sqrt(2 / 3)  # 1.4826: median absolute deviation -> std of a normal
    return noise * math.sqrt(2 / max(1, len(values) // PARTS))


class Curve:
    """A metric over a run."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.start, self.end = ends(values)
        self.last = values[-1] if values else math.nan

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def upper_quartile(self) -> float:
        return sorted(self.values)[len(self.values) * 3 // 4]

    @property
    def noise(self) -> float:
        """The largest change of the ends that is not a finding."""
        return ERRORS * error_of_change(self.values)


def large_change(level: float, spreads: Values) -> float:
    """The smallest change of held-out scores that counts, from their spread, or their level without it."""
    return LARGE_CHANGE * max(spreads) if spreads else LARGE_WITHOUT_SPREAD * abs(level)

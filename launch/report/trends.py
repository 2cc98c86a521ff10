"""Where a noisy curve begins, ends and peaks, and how much of its change may be noise. Pure."""

import math
from collections.abc import Sequence
from statistics import fmean, median

Values = Sequence[float]

PARTS = 5  # beginnings and ends are a fifth of a curve, so that no single value decides
FEWEST = 5  # values from which noise can be told
ERRORS = 3  # a change by more standard errors than this is not noise
LARGE_CHANGE = 0.25  # of held-out scores, as a share of their spread
LARGE_WITHOUT_SPREAD = 0.05  # as a share of their level, where the spread is not known


def running_means(values: Values) -> list[float]:
    """Means over a fifth of the values (N,) at a time, (N - width + 1,)."""
    width = max(1, len(values) // PARTS)
    return [fmean(values[start : start + width]) for start in range(len(values) - width + 1)]


def ends(values: Values) -> tuple[float, float]:
    """Means over the first and over the last fifth; NaN, which is beyond no threshold, without values."""
    means = running_means(values) if values else [math.nan]
    return means[0], means[-1]


def peak(values: Values) -> int:
    """Place of the highest running mean: of the value in its middle."""
    means = running_means(values)
    return means.index(max(means)) + (len(values) - len(means)) // 2


def error_of_change(values: Values) -> float:
    """Standard error of the difference of two running means, by the noise around the trend.

    The noise is estimated from the distance of each value to the mean of its neighbours, which a straight
    trend leaves at 0 (Gasser et al. 1986), by the median, which a few jumps leave alone. Infinite for fewer
    than FEWEST values.
    """
    if len(values) < FEWEST:
        return math.inf
    bends = [abs((a + c) / 2 - b) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    noise = 1.4826 * median(bends) * math.sqrt(2 / 3)  # 1.4826: from the median of a normal to its std
    return noise * math.sqrt(2 / max(1, len(values) // PARTS))


def large_change(level: float, spreads: Values) -> float:
    """A change of held-out scores that matters, from the spreads within evaluations, or else their level."""
    return LARGE_CHANGE * max(spreads) if spreads else LARGE_WITHOUT_SPREAD * abs(level)

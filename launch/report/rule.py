"""Rules of the report, and the findings that they return."""

from collections.abc import Callable
from typing import Any, NamedTuple

from launch.report.trends import Curve, Values


class Finding(NamedTuple):
    """A problem with its numbers, and advice."""

    problem: str
    advice: str


class Rule(NamedTuple):
    """A check of some metrics.

    check: called with a list of values for each metric, group after group. A group uses the lines that hold
    all of its metrics. Options are passed by name if options.json has them.
    """

    name: str  # in the list of rules that were not checked
    stages: str  # to which the rule applies, separated by spaces
    metrics: str  # separated by spaces, their groups by commas
    check: Callable[..., Finding | None]
    fewest: int = 1  # values per group
    needs: str = ""  # the option without which the metrics are absent
    optional: bool = False  # for a feature that most runs do not use: never listed as not checked
    options: tuple[str, ...] = ()

    @property
    def groups(self) -> list[list[str]]:
        return [group.split() for group in self.metrics.split(",")]

    @property
    def is_of_evaluations(self) -> bool:
        return any(name.startswith("eval/") for name in self.groups[0])

    def applies(self, stage: str) -> bool:
        """True also for an unknown stage: then the metrics decide."""
        return not stage or stage in self.stages.split()


def when(condition: Callable[..., bool], problem: str, advice: str) -> Callable[..., Finding | None]:
    """A check with one condition on the curves of its metrics and on options.

    problem: a format string; {end} is that of the first curve, {1.end} that of the second.
    """

    def check(*metrics: Values, **options: Any) -> Finding | None:
        curves = [*map(Curve, metrics)]
        if not condition(*curves, **options):
            return None
        return Finding(problem.format(*curves, **vars(curves[0]), **options), advice)

    return check

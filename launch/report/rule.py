"""A rule of the report: what it checks, on which metrics, and what it needs to be able to."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """A problem with its figures, and what to try."""

    found: str
    advice: str


class Rule(NamedTuple):
    """A check of some metrics.

    check: called with a list of values for each metric, group after group. The metrics of one group are taken
    from the lines that hold all of them. Options are passed by name, as far as options.json has them.
    """

    name: str  # in the list of what was not checked
    check: Callable[..., Finding | None]
    groups: tuple[tuple[str, ...], ...]
    stages: str  # names of the stages, by spaces, in which the rule applies
    fewest: int = 1  # values of each group
    needs: str = ""  # an option, in words, without which the metrics are absent
    optional: bool = (
        False  # of a feature that most runs do not use: never in the list of what was not checked
    )
    options: tuple[str, ...] = ()

    @property
    def is_of_evaluations(self) -> bool:
        return any(name.startswith("eval/") for name in self.groups[0])

    def applies(self, stage: str) -> bool:
        """Also to a run of unknown stage, if it has the metrics."""
        return not stage or stage in self.stages.split()


Options = dict[str, Any]

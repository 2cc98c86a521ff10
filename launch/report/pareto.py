"""Held-out scores of runs with the same objectives and other weights: which runs no other run beats."""

import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from common.runtime.options import reason
from launch.report.curves import COLOURS, Picture, new_figure, save_picture
from launch.report.read import Run, columns

PREFIX, OF_ALL = "eval/score_", "eval/score_std"
MOST_PAIRS = 6  # of four objectives
MOST_LABELS = 12  # runs; with more, the front alone is labelled


class Point(NamedTuple):
    """A run at its last evaluation."""

    label: str  # its weights
    start: dict[str, float]  # score by objective before training
    end: dict[str, float]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other point dominates, from left to right.

    A point dominates another one if it is at least as high in both scores and higher in one.
    """

    def is_dominated(point: tuple[float, float]) -> bool:
        return any(o[0] >= point[0] and o[1] >= point[1] and o != point for o in points)

    return sorted((n for n, point in enumerate(points) if not is_dominated(point)), key=points.__getitem__)


def draw_fronts(runs: Sequence[Run], folder: Path) -> tuple[list[Picture], list[str]]:
    """Draw each pair of objectives of runs with the same ones; also sentences about failed plots."""
    pictures, problems = [], []
    for group, points in enumerate(_points(runs)):
        pairs = list(combinations(points[0].end, 2))
        for number, (across, up) in enumerate(pairs[:MOST_PAIRS]):
            try:
                path = folder / f"objectives_{group}_{number}.png"
                pictures.append(save_picture(*draw_pair(points, across, up), path))
            except OSError:
                raise
            except Exception as error:  # noqa: BLE001 - Matplotlib raises anything for odd names and numbers
                problems.append(f"{across} and {up}: cannot be plotted: {reason(error)}.")
        if len(pairs) > MOST_PAIRS:
            problems.append(f"{len(pairs) - MOST_PAIRS} more pairs of objectives are not plotted.")
    return pictures, problems


def draw_pair(points: Sequence[Point], across: str, up: str) -> tuple[Any, str]:
    """Plot two scores of each run, and connect the front. Returns figure and description."""
    ends = [(point.end[across], point.end[up]) for point in points]
    best = front(ends)
    figure, (axes,) = new_figure(f"Held-out scores: {_named(up)} over {_named(across)}", (7.2, 4.6), 1)
    starts = {(point.start[across], point.start[up]) for point in points}
    axes.scatter(*zip(*starts, strict=True), marker="x", color="0.4", label="before training")
    others = [end for number, end in enumerate(ends) if number not in best]
    if others:
        axes.scatter(*zip(*others, strict=True), color=COLOURS[0], alpha=0.45, label="dominated")
    axes.plot(*zip(*(ends[n] for n in best), strict=True), "o-", color=COLOURS[1], label="front")
    for number, point in enumerate(points):
        if number in best or len(points) <= MOST_LABELS:
            axes.annotate(point.label, ends[number], (6, 5), textcoords="offset points", fontsize=8)
    axes.margins(0.12)
    axes.set_xlabel(f"{PREFIX}{across}")
    axes.set_ylabel(f"{PREFIX}{up}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    shown = "; ".join(f"{points[n].label}: {ends[n][0]:.3g} and {ends[n][1]:.3g}" for n in best)
    return figure, (
        f"Held-out scores of {len(points)} runs, labelled by their weights. On the front,"
        f" {_named(across)} and {_named(up)}: {shown}."
    )


def _named(objective: str) -> str:
    return f"reward model {objective}" if objective.isdecimal() else objective


def _points(runs: Sequence[Run]) -> list[list[Point]]:
    """Groups of two or more runs with the same objectives, on the same prompts."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        names = _objectives(run)
        if len(names) > 1 and _scores(run)[0]:
            groups.setdefault((*names, "", *_inputs(run)), []).append(run)
    return [[_point(run, group) for run in group] for group in groups.values() if len(group) > 1]


def _objectives(run: Run) -> list[str]:
    """Names of the reward models and functions with held-out scores."""
    names = dict.fromkeys(name for line in run.lines for name in line)
    return [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX) and name != OF_ALL]


def _scores(run: Run) -> list[list[float]]:
    """Scores by objective at each evaluation that has all of them."""
    return columns(run.lines, *(f"{PREFIX}{name}" for name in _objectives(run)))


def _inputs(run: Run) -> list[str]:
    """Reward models, functions without weights, and data."""
    names = ("reward_model_name_or_path", "prompt_data", "eval_data")
    values = [str(value) for name in names for value in run.valid_options.get(name, [])]
    return [*values, *(function for function, _ in _functions(run))]


def _functions(run: Run) -> list[tuple[str, str]]:
    """Each reward function as FILE.py:NAME, and its weight."""
    sources = map(str, run.valid_options.get("reward_function", []))
    matches = [re.fullmatch(r"(.+\.py:\w+)(?::(.+))?", source) for source in sources]
    return [(match[1], match[2] or "1") for match in matches if match]


def _point(run: Run, group: Sequence[Run]) -> Point:
    columns_by_name = dict(zip(_objectives(run), _scores(run), strict=True))
    start, end = ({name: values[at] for name, values in columns_by_name.items()} for at in (0, -1))
    return Point(_label(run, group), start, end)


def _label(run: Run, group: Sequence[Run]) -> str:
    """Weights in the order of the objectives; --normalise_scores where the runs differ in it."""
    models = run.valid_options.get("reward_model_name_or_path", [])
    weights = [str(weight) for weight in run.valid_options.get("reward_weights", []) or ["1"] * len(models)]
    weights += [weight for _, weight in _functions(run)]
    modes = {str(one.options.get("normalise_scores")) for one in group}
    mode = f" ({run.options.get('normalise_scores')})" if len(modes) > 1 else ""
    return " : ".join(weight.removesuffix(".0") for weight in weights) + mode

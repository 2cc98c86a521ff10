"""Plots of a reward model: reliability diagram and score histogram."""

from typing import Any

import numpy as np

from step2_reward.evaluation.figures import ScoredPairs

DARK, LIGHT = "#1b4f8a", "#f2a541"  # distinct for the colour-blind and in greyscale
HISTOGRAM_BINS = 30


def plots(judged: ScoredPairs, metrics: dict[str, Any]) -> dict[str, Any]:
    """Draw Matplotlib figures by name, each for `savefig` and for TensorBoard's `add_figure`."""
    return {"reliability": reliability_diagram(metrics), "scores": score_histogram(judged)}


def reliability_diagram(metrics: dict[str, Any]) -> Any:
    """Plot accuracy over confidence with 95 % intervals, and the pairs per bin: Guo et al. 2017, fig. 1."""
    error, bins = metrics["prediction"]["calibration_error"], metrics["prediction"]["bins"]
    names = ("confidence", "accuracy", "low", "high", "pairs")
    confidence, accuracy, low, high, pairs = (np.array([one[name] for one in bins]) for name in names)
    figure, (upper, lower) = _figure(f"Calibration of the reward model: error {error:.1%}", [3, 1])
    upper.plot([0.5, 1], [0.5, 1], color="0.4", linestyle="--", label="perfectly calibrated")
    whiskers = [accuracy - low, high - accuracy]
    upper.errorbar(confidence, accuracy, whiskers, fmt="o", color=DARK, capsize=3, label="this model")
    upper.set(ylabel="accuracy, 95% interval", ylim=(0, 1.02))
    lower.bar_label(lower.bar(confidence, pairs, width=0.012, color=DARK), fontsize=8, padding=1)
    lower.set(xlabel="confidence: predicted probability of the response it prefers", ylabel="pairs")
    lower.set(xlim=(0.49, 1.01), ylim=(0, 1.3 * pairs.max()))
    for axis in (upper.yaxis, lower.xaxis):
        axis.set_major_formatter("{x:.0%}")
    _legend(upper)
    return figure


def score_histogram(judged: ScoredPairs) -> Any:
    """Plot the scores of chosen and rejected responses, without ties, and their means."""
    chosen, rejected = judged.chosen_scores[~judged.is_tie], judged.rejected_scores[~judged.is_tie]
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), HISTOGRAM_BINS)
    figure, (axes,) = _figure("Scores of held-out responses", [1])
    axes.hist(rejected, edges, color=LIGHT, label="rejected")
    axes.axvline(rejected.mean(), color="0.2", linestyle="--", label=f"mean {rejected.mean():.2f}")
    axes.hist(chosen, edges, histtype="step", color=DARK, linewidth=2, label="chosen")
    axes.axvline(chosen.mean(), color=DARK, linestyle=":", linewidth=2, label=f"mean {chosen.mean():.2f}")
    axes.set(xlabel="score", ylabel="responses")
    _legend(axes)
    return figure


def _figure(title: str, heights: list[int]) -> tuple[Any, Any]:
    """Make a figure, which needs no display, and its panels from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(axes: Any) -> None:
    """Draw the legend above the panel, where it hides no data."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)

"""Plots of metrics.jsonl: one panel per group of metrics, and score and gold over KL."""

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from common.runtime.options import reason
from launch.report.read import Line, columns
from launch.report.trends import peak

# Groups, their panels, and the metrics of each panel. Metrics that a run does not log are left out.
PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "Learning": {
        "Loss": ("train/loss", "eval/loss"),
        "Accuracy": ("train/accuracy", "eval/accuracy", "eval/sign_accuracy"),
        "Records whose first wrong step is found": ("train/first_error", "eval/first_error"),
        "Share of steps labelled right": ("train/right_share", "eval/right_share"),
        "Perplexity on held-out data": ("eval/perplexity",),
        "Margin of chosen over rejected": ("train/margin", "eval/margin"),
        "Mean scores of held-out pairs": ("eval/chosen_mean", "eval/rejected_mean"),
        "NLL of chosen responses, nats per token": ("train/nll_chosen", "eval/nll_chosen"),
        "Log-probability of a response": ("logprobs/chosen", "logprobs/rejected"),
        "Implicit rewards": ("reward/chosen", "reward/rejected", "reward/margin"),
        "Spread of scores of held-out pairs": ("eval/chosen_std", "eval/rejected_std"),
        "Language-model loss": ("train/lm_loss", "ptx/loss"),
    },
    "Reward and KL": {
        "Score of a response": ("reward/mean", "reward/median", "reward/p10", "reward/p90"),
        "Reward: score minus penalties and KL": ("reward/total",),
        "Penalties, and share of clipped scores": ("reward/penalty", "reward/clipped"),
        "Cost of a response, and its limit": ("cost/mean", "cost/limit", "eval/cost"),
        "Share of harmful responses": ("cost/harmful_share",),
        "Multiplier of the cost": ("cost/lambda",),
        "Score on held-out prompts": ("eval/score",),
        "Gold score on held-out prompts": ("eval/gold",),
        "Score of each reward model and function": ("reward/mean_*",),
        "Probability that a step is right; of the worst step": ("process/mean", "process/min"),
        "Spread of scores": ("reward/std", "eval/score_std", "reward/std_between", "cost/std"),
        "Spread of each reward model and function": ("reward/std_*",),
        "Score of each on held-out prompts": ("eval/score_*",),
        "KL to the reference, nats per response": ("kl/mean", "eval/kl"),
        "KL by quarter of the response, nats per token": ("kl/quarter_*",),
        "Coefficient of the KL penalty": ("kl/coef",),
        "Log-ratio to the reference, on the data": (
            "logratio/mean",
            "eval/logratio_mean",
            "kl/reference_point",
        ),
    },
    "Responses": {
        "Length in tokens": ("response/length", "eval/length"),
        "Steps of a response": ("process/steps",),
        "Share that ends in EOS": ("response/eos_rate", "eval/eos_rate"),
        "Distinct tokens and pairs": ("response/distinct_?", "eval/distinct_?"),
        "Repeated trigrams": ("response/repeated_3", "eval/repeated_3"),
    },
    "Policy and critic": {
        "Entropy, nats per token": ("policy/entropy",),
        "Share of clipped tokens": (
            "policy/clip_fraction",
            "value/clip_fraction",
            "cost_value/clip_fraction",
        ),
        "KL of one rollout's updates, nats per token": ("policy/approx_kl",),
        "KL at the last update, nats per response": ("policy/update_kl",),
        "Perplexity of sampled responses": ("policy/perplexity",),
        "Ratio at the first minibatch": ("policy/ratio",),
        "Gap of sampler and trainer, nats per token": ("rollout/gap_*",),
        "Effective sample size of a rollout": ("rollout/ess",),
        "Policy loss": ("policy/loss",),
        "Value loss": ("value/loss", "cost_value/loss"),
        "Explained variance of the critic": ("value/explained_var", "cost_value/explained_var"),
        "Mean value": ("value/mean", "cost_value/mean"),
    },
    "Optimiser": {
        "Gradient norm": ("train/grad_norm", "policy/grad_norm", "value/grad_norm", "cost_value/grad_norm"),
        "Learning rate": ("train/lr",),
        "Updates": ("policy/updates", "train/skipped_updates"),
    },
    "Time and memory": {
        "Seconds per step": ("time/*",),
        "Tokens per second": ("*tokens_per_second",),
        "Share of padding in training; share of useful positions in sampling": (
            "train/padding_share",
            "rollout/useful_share",
        ),
        "Model FLOPs utilisation": ("train/mfu",),
        "Peak memory, GiB": ("memory/*",),
    },
}
BAND = ["reward/p10", "reward/p90"]
TRADE = "Score and gold over KL"
GROUPS = {TRADE, *PANELS}
MOST_PANELS = 100
COLOURS = ("#1b4f8a", "#e08a1e", "#3a8f6b", "#b3446c", "#6b7280")  # safe for colour-blind readers
DPI = 130
FEW = 25  # points; curves with no more than these have markers


class Picture(NamedTuple):
    """A PNG and its description."""

    path: Path
    alt: str


def draw_all(lines: Sequence[Line], folder: Path) -> tuple[dict[str, list[Picture]], list[str]]:
    """Plot all metrics into a folder; returns pictures by group, and sentences about failed plots."""
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    logged = [name for name in names if columns(lines, name)[0]]
    plots: list[tuple[str, str, Callable[[], tuple[Any, str]]]] = []
    if columns(lines, "eval/kl", "eval/score", "eval/gold")[0]:
        plots.append((TRADE, "score_and_gold", partial(draw_trade, lines)))
    plots += [(group, title, partial(draw_panel, title, shown, lines))
              for group, title, shown in panels(logged)]  # fmt: skip
    by_group: dict[str, list[Picture]] = {}
    problems = []
    for number, (group, title, draw) in enumerate(plots[:MOST_PANELS]):
        slug = re.sub("[^a-z0-9]+", "_", title.lower())
        path = folder / f"{slug if group in GROUPS else f'other_{number}'}.png"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # characters missing in the font
                by_group.setdefault(group, []).append(save_picture(*draw(), path))
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - Matplotlib raises anything for odd names and numbers
            problems.append(f"{title}: cannot be plotted: {reason(error)}.")
    if len(plots) > MOST_PANELS:
        problems.append(f"{len(plots) - MOST_PANELS} more metrics are not plotted.")
    return {group: pictures for group, pictures in by_group.items() if pictures}, problems


def panels(names: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Group, title and metrics of each panel. A metric without a panel has one in the group "Others"."""
    left = list(names)
    for group, members in PANELS.items():
        for title, patterns in members.items():
            if shown := [name for pattern in patterns for name in fnmatch.filter(left, pattern)]:
                left = [name for name in left if name not in shown]
                yield group, title, shown
    for name in left:
        yield "Others", name, [name]


def draw_panel(title: str, names: Sequence[str], lines: Sequence[Line]) -> tuple[Any, str]:
    """Plot metrics over steps (held-out: dashed), percentiles as a band. Returns figure and description."""
    figure, (axes,) = new_figure(title, (4.8, 3.1), 1)
    descriptions = []
    steps, low, high = columns(lines, "step", *BAND)
    if steps and set(BAND) <= set(names):
        axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="p10 to p90")
        names = [name for name in names if name not in BAND]
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        steps, values = columns(lines, "step", name)
        style = "--" if name.startswith("eval/") else "-"
        marker = "o" if len(steps) <= FEW else ""
        axes.plot(steps, values, style, marker=marker, markersize=3.5, color=colour, label=name)
        descriptions.append(
            f"{name} from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}"
        )
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure, f"{title}: {'; '.join(descriptions)}."


def draw_trade(lines: Sequence[Line]) -> tuple[Any, str]:
    """Plot score and gold over the root of KL, as in Gao et al. 2023, figure 1b."""
    steps, kls, scores, golds = columns(lines, "step", "eval/kl", "eval/score", "eval/gold")
    distance = [max(kl, 0.0) ** 0.5 for kl in kls]  # estimates may be negative
    top = peak(golds)
    figure, (upper, lower) = new_figure(TRADE, (7.2, 4.6), 2)
    for axes, values, name, colour in (
        (upper, scores, "score", COLOURS[0]),
        (lower, golds, "gold", COLOURS[1]),
    ):
        axes.plot(distance, values, marker="o", markersize=4, color=colour)
        axes.axvline(distance[top], color="0.4", linestyle=":")
        axes.set_ylabel(f"eval/{name}")
    # Below the curve and right of the peak, where the plot is empty.
    position = {"xycoords": upper.get_xaxis_transform(), "textcoords": "offset points", "fontsize": 8}
    upper.annotate(f"peak of gold, step {steps[top]}", (distance[top], 0), (6, 6), **position)
    lower.set_xlabel("√KL to the reference (√nats)")
    return figure, (
        "Held-out score and gold over the root of KL."
        f" Gold peaks around step {steps[top]}: {golds[top]:.3g}, score {scores[top]:.3g}, KL {kls[top]:.3g}."
        f" At step {steps[-1]}: gold {golds[-1]:.3g}, score {scores[-1]:.3g}, KL {kls[-1]:.3g} nats."
    )


def new_figure(title: str, size: tuple[float, float], rows: int) -> tuple[Any, Any]:
    """A figure and its axes from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.02, horizontalalignment="left")
    all_axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, all_axes


def save_picture(figure: Any, alt: str, path: Path) -> Picture:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return Picture(path, alt)

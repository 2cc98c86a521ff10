"""Pictures of the curves in metrics.jsonl: small panels, and score and gold over the distance travelled."""

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

# Groups, their panels, and the metrics of each panel. What a run does not log is left out.
PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "Learning": {
        "Loss": ("train/loss", "eval/loss"),
        "Accuracy": ("train/accuracy", "eval/accuracy"),
        "Perplexity on held-out data": ("eval/perplexity",),
        "Margin of chosen over rejected": ("train/margin", "eval/margin"),
        "Mean scores of held-out pairs": ("eval/chosen_mean", "eval/rejected_mean"),
        "NLL of chosen responses, nats per token": ("train/nll_chosen", "eval/nll_chosen"),
        "Log-probability of a response": ("logprobs/chosen", "logprobs/rejected"),
        "Implicit rewards": ("reward/chosen", "reward/rejected", "reward/margin"),
        "Spread of these scores": ("eval/chosen_std", "eval/rejected_std"),
        "Language-model loss": ("train/lm_loss", "ptx/loss"),
    },
    "Reward and distance": {
        "Score of a response": ("reward/mean", "reward/median", "reward/p10", "reward/p90"),
        "Reward: score less penalties and KL": ("reward/total",),
        "Penalties, and share of clipped scores": ("reward/penalty", "reward/clipped"),
        "Score on held-out prompts": ("eval/score",),
        "Gold on held-out prompts": ("eval/gold",),
        "Parts of the score": ("reward/mean_*",),
        "Spread of scores": ("reward/std", "eval/score_std", "reward/std_between"),
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
        "Share that ends in EOS": ("response/eos_rate", "eval/eos_rate"),
        "Distinct tokens and pairs": ("response/distinct_?", "eval/distinct_?"),
        "Repeated trigrams": ("response/repeated_3", "eval/repeated_3"),
    },
    "Policy and critic": {
        "Entropy, nats per token": ("policy/entropy",),
        "Share of clipped tokens": ("policy/clip_fraction", "value/clip_fraction"),
        "KL of one rollout's updates, nats per token": ("policy/approx_kl",),
        "KL at the last update, nats per response": ("policy/update_kl",),
        "Perplexity of its own responses": ("policy/perplexity",),
        "Ratio at the first minibatch": ("policy/ratio",),
        "Policy loss": ("policy/loss",),
        "Value loss": ("value/loss",),
        "Explained variance of the critic": ("value/explained_var",),
        "Mean value": ("value/mean",),
    },
    "Optimiser": {
        "Gradient norm": ("train/grad_norm", "policy/grad_norm", "value/grad_norm"),
        "Learning rate": ("train/lr",),
        "Updates": ("policy/updates", "train/skipped_updates"),
    },
    "Time and memory": {
        "Seconds per step": ("time/*",),
        "Tokens per second": ("*tokens_per_second",),
        "Share of padding; share of positions that count in sampling": (
            "train/padding_share",
            "rollout/useful_share",
        ),
        "Share of the peak FLOP/s": ("train/mfu",),
        "Most memory, GiB": ("memory/*",),
    },
}
BAND = ["reward/p10", "reward/p90"]
TRADE = "Score and gold over distance"
GROUPS = {TRADE, *PANELS}
MOST_PANELS = 100
COLOURS = ("#1b4f8a", "#e08a1e", "#3a8f6b", "#b3446c", "#6b7280")  # apart also for the colour-blind
DPI = 130
FEW = 25  # points, up to which each is marked


class Picture(NamedTuple):
    """A PNG, and what it shows in words."""

    path: Path
    alt: str


def draw_all(lines: Sequence[Line], folder: Path) -> tuple[dict[str, list[Picture]], list[str]]:
    """Draw the metrics of the lines into a folder: the pictures of each group, and sentences about metrics
    that cannot be drawn.
    """
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    logged = [name for name in names if columns(lines, name)[0]]
    wanted: list[tuple[str, str, Callable[[], tuple[Any, str]]]] = []
    if columns(lines, "eval/kl", "eval/score", "eval/gold")[0]:
        wanted.append((TRADE, "score_and_gold", partial(draw_trade, lines)))
    wanted += [(group, title, partial(draw_panel, title, shown, lines))
               for group, title, shown in panels(logged)]  # fmt: skip
    made: dict[str, list[Picture]] = {}
    problems = []
    for number, (group, title, draw) in enumerate(wanted[:MOST_PANELS]):
        slug = re.sub("[^a-z0-9]+", "_", title.lower())
        path = folder / f"{slug if group in GROUPS else f'other_{number}'}.png"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # signs that the font does not have
                made.setdefault(group, []).append(_save(*draw(), path))
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - Matplotlib raises anything for odd names and numbers
            problems.append(f"{title}: cannot be drawn: {reason(error)}.")
    if len(wanted) > MOST_PANELS:
        problems.append(f"{len(wanted) - MOST_PANELS} more metrics are not drawn.")
    return {group: pictures for group, pictures in made.items() if pictures}, problems


def panels(names: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Group, title and metrics of each panel that has any; one that no panel asks for is among the others."""
    left = list(names)
    for group, members in PANELS.items():
        for title, patterns in members.items():
            if shown := [name for pattern in patterns for name in fnmatch.filter(left, pattern)]:
                left = [name for name in left if name not in shown]
                yield group, title, shown
    for name in left:
        yield "Others", name, [name]


def draw_panel(title: str, names: Sequence[str], lines: Sequence[Line]) -> tuple[Any, str]:
    """Metrics over the steps, held-out ones dashed, percentiles as a band; and the same in words."""
    figure, (axes,) = _figure(title, (4.8, 3.1), 1)
    spoken = []
    steps, low, high = columns(lines, "step", *BAND)
    if steps and set(BAND) <= set(names):
        axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="p10 to p90")
        names = [name for name in names if name not in BAND]
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        steps, values = columns(lines, "step", name)
        style = "--" if name.startswith("eval/") else "-"
        marker = "o" if len(steps) <= FEW else ""
        axes.plot(steps, values, style, marker=marker, markersize=3.5, color=colour, label=name)
        spoken.append(
            f"{name} from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}"
        )
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure, f"{title}: {'; '.join(spoken)}."


def draw_trade(lines: Sequence[Line]) -> tuple[Any, str]:
    """What training asked for and what it was for over the root of KL, as in Gao et al. 2023, figure 1b."""
    steps, kls, scores, golds = columns(lines, "step", "eval/kl", "eval/score", "eval/gold")
    distance = [max(kl, 0.0) ** 0.5 for kl in kls]  # an estimate of 0 may be below it
    top = peak(golds)
    figure, (upper, lower) = _figure(TRADE, (7.2, 4.6), 2)
    for axes, values, name, colour in (
        (upper, scores, "score", COLOURS[0]),
        (lower, golds, "gold", COLOURS[1]),
    ):
        axes.plot(distance, values, marker="o", markersize=4, color=colour)
        axes.axvline(distance[top], color="0.4", linestyle=":")
        axes.set_ylabel(f"eval/{name}")
    # Below the score and right of the peak, where there is room.
    place = {"xycoords": upper.get_xaxis_transform(), "textcoords": "offset points", "fontsize": 8}
    upper.annotate(f"peak of gold, step {steps[top]}", (distance[top], 0), (6, 6), **place)
    lower.set_xlabel("distance from the reference: root of eval/kl, in nats")
    return figure, (
        "Held-out score and gold over the root of KL."
        f" Gold peaks around step {steps[top]}: {golds[top]:.3g}, score {scores[top]:.3g}, KL {kls[top]:.3g}."
        f" At step {steps[-1]}: gold {golds[-1]:.3g}, score {scores[-1]:.3g}, KL {kls[-1]:.3g} nats."
    )


def _figure(title: str, size: tuple[float, float], rows: int) -> tuple[Any, Any]:
    """A figure, which needs no screen, and its axes from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.02, horizontalalignment="left")
    all_axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    for axes in all_axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, all_axes


def _save(figure: Any, alt: str, path: Path) -> Picture:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return Picture(path, alt)

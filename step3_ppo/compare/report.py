"""The comparison of policies as a table and as a plot."""

from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # safe for colour-blind readers

HEADS = ("wins, ties, losses", "win rate without ties", "win rate at equal length")


def table(figures: dict[str, Any]) -> str:
    """Policies side by side, each against the first; then the other pairs, and best of n of the first."""
    policies, curve = figures["policies"], figures["best_of"]
    judges = list(policies[0]["scores"])
    lines = [
        ["", *(str(number) for number in range(1, len(policies) + 1))],
        *([name, *(_interval(policy["scores"][name]) for policy in policies)] for name in judges),
        ["KL to 1, nats", *(_interval(policy["kl"]) for policy in policies)],
        ["length, tokens", *(f"{policy['length']:.1f}" for policy in policies)],
        ["ended by EOS", *(f"{policy['eos_rate']:.1%}" for policy in policies)],
        ["distinct-1", *(f"{policy['distinct_1']:.3f}" for policy in policies)],
        ["distinct-2", *(f"{policy['distinct_2']:.3f}" for policy in policies)],
        ["repeated trigrams", *(f"{policy['repeated_3']:.1%}" for policy in policies)],
    ]
    if policies[0]["perplexity"] is not None:
        lines.append(["perplexity", *(f"{policy['perplexity']:.3f}" for policy in policies)])
    for name in judges if len(policies) > 1 else ():
        against = [policy["against"][0][name] for policy in policies[1:]]
        lines += [
            [],
            [f"{name}: {HEADS[0]}", "", *map(_counts, against)],
            [HEADS[1], "", *(_share(one["win_rate"]) for one in against)],
            [HEADS[2], "", *map(_at_equal_length, against)],
        ]
    blocks = [_aligned(lines)]
    pairs = [(ours, theirs) for ours in range(2, len(policies)) for theirs in range(1, ours)]
    for name in judges if pairs else ():
        rows = [[f"{name}: other pairs", *HEADS]]
        for ours, theirs in pairs:
            one = policies[ours]["against"][theirs][name]
            cells = _counts(one), _share(one["win_rate"]), _at_equal_length(one)
            rows.append([f"{ours + 1} against {theirs + 1}", *cells])
        blocks.append(_aligned(rows))
    if len(curve) > 1:
        heads = [f"best of n by {judges[0]}", "KL, nats", *judges]
        rows = [[str(one["n"]), f"{one['kl']:.3f}", *map(_interval, one["scores"].values())] for one in curve]
        blocks.append(_aligned([heads, *rows]))
    models = [f"{number}  {policy['model']}" for number, policy in enumerate(policies, start=1)]
    title = f"{figures['prompts']} held-out prompts, 95% intervals"
    return "\n\n".join([f"{title}\n" + "\n".join(models), *blocks])


def plot_scores(figures: dict[str, Any]) -> Any:
    """Matplotlib figure of scores over the root of KL: policies and best of n, one panel per judge.

    As in Gao et al. 2023, figure 1.
    """
    from matplotlib.figure import Figure

    policies, curve = figures["policies"], figures["best_of"]
    judges = list(policies[0]["scores"])
    figure = Figure(figsize=(7, 1.2 + 2.8 * len(judges)), layout="constrained")
    figure.suptitle("Scores of held-out responses, 95% intervals")
    panels = figure.subplots(len(judges), sharex=True, squeeze=False)[:, 0]
    for name, axes in zip(judges, panels, strict=True):
        for number, policy in enumerate(policies):
            label = f"{number + 1}  {'/'.join(Path(policy['model']).parts[-2:])}"
            colour = COLOURS[number % len(COLOURS)]
            _points(axes, [policy["kl"]["mean"]], [policy["scores"][name]], "o", colour, label)
        if len(curve) > 1:
            kls, scores = [one["kl"] for one in curve], [one["scores"][name] for one in curve]
            _points(axes, kls, scores, ".-", "0.4", f"best of n of 1, by {judges[0]}")
            for one, kl in zip(curve, kls, strict=True):
                point = (kl**0.5, one["scores"][name]["mean"])
                axes.annotate(one["n"], point, (4, -10), textcoords="offset points", color="0.4", fontsize=8)
        axes.set(ylabel=name)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set(xlabel="√KL to the first policy (√nats)")
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def _points(axes: Any, kls: list[float], scores: list[dict], form: str, colour: str, label: str) -> None:
    """Means with their intervals. A KL estimate below 0 is drawn at 0."""
    means = [score["mean"] for score in scores]
    whiskers = [[s["mean"] - s["low"] for s in scores], [s["high"] - s["mean"] for s in scores]]
    roots = [max(kl, 0.0) ** 0.5 for kl in kls]
    depth = 3 if form == "o" else 2  # points lie above curves
    axes.errorbar(roots, means, whiskers, fmt=form, color=colour, capsize=3, label=label, zorder=depth)


def _interval(one: dict[str, float]) -> str:
    return f"{one['mean']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def _counts(one: dict[str, Any]) -> str:
    return f"{one['wins']}, {one['ties']}, {one['losses']}"


def _share(one: dict[str, float] | None) -> str:
    return "none" if one is None else f"{one['mean']:.1%} ({one['low']:.1%} to {one['high']:.1%})"


def _at_equal_length(one: dict[str, Any]) -> str:
    inseparable = one["win_rate"] is not None and one["at_equal_length"] is None
    return "not separable from length" if inseparable else _share(one["at_equal_length"])


def _aligned(lines: list[list[str]]) -> str:
    """Columns of cells: the first left-aligned, the others right-aligned. An empty line stays empty."""
    rows = [line for line in lines if line]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "   ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    )

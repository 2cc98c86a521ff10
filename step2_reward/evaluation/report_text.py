"""The figures of a reward model as text for a terminal."""

from typing import Any

from step2_reward.evaluation.figures import PERCENTILES, SATURATED


def table(figures: dict[str, Any]) -> str:
    """Accuracy overall and by group, what else `measure` found, and the spread of the scores."""
    groups = {"all pairs": figures["accuracy"]}
    for kind, found in figures["accuracy_by"].items():
        groups |= {f"{kind:8}{name}": one for name, one in found.items()}
    facts = {
        "ties, left out above": str(figures["ties"]),
        "log-loss (coin toss: 0.693)": f"{figures['prediction']['log_loss']:.3f}",
        "mean confidence": f"{figures['prediction']['confidence']:.1%}",
        "calibration error": f"{figures['prediction']['calibration_error']:.1%}",
        f"confidence above {SATURATED:.1%}": f"{figures['prediction']['saturation']:.1%}",
        "score and length, Pearson": _show(figures["length"]["pearson"], "+.2f"),
        "score and length, Spearman": _show(figures["length"]["spearman"], "+.2f"),
        "longer one is chosen": f"{figures['length']['longer_wins']['accuracy']:.1%}",
        "longer one scores higher": _show((figures["length"]["prefers_longer"] or {}).get("accuracy"), ".1%"),
        "raters agree with majority": _show(figures["agreement"]["mean"], ".1%"),
    }
    heads = ("mean", "std", *(f"p{p}" for p in PERCENTILES))
    width = max(len(name) for name in (*groups, *facts))
    return "\n".join(
        [
            f"{'':{width}}{'pairs':>9}{'accuracy':>10}   95% interval",
            *(f"{name:{width}}{_accuracy(one)}" for name, one in groups.items()),
            "",
            *(f"{name:{width}}{value:>9}" for name, value in facts.items()),
            "",
            f"{'score':10}" + "".join(f"{head:>8}" for head in heads),
            *(
                f"{name:10}" + "".join(f"{one[head]:8.2f}" for head in heads)
                for name, one in figures["scores"].items()
            ),
        ]
    )


def _accuracy(one: dict[str, Any]) -> str:
    return f"{one['pairs']:9}{one['accuracy']:10.1%}   {one['low']:.1%} to {one['high']:.1%}"


def _show(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)

"""The metrics of a reward model as a table for the terminal."""

from typing import Any

from step2_reward.evaluation.figures import PERCENTILES, SATURATED


def table(metrics: dict[str, Any]) -> str:
    """Format accuracy overall and by group, the other metrics, and the spread of the scores."""
    groups = {"all pairs": metrics["accuracy"]}
    for kind, by_name in metrics["accuracy_by"].items():
        groups |= {f"{kind:8}{name}": one for name, one in by_name.items()}
    facts = {
        "ties (excluded above)": str(metrics["ties"]),
        "log-loss (coin toss: 0.693)": f"{metrics['prediction']['log_loss']:.3f}",
        "mean confidence": f"{metrics['prediction']['confidence']:.1%}",
        "calibration error": f"{metrics['prediction']['calibration_error']:.1%}",
        f"confidence above {SATURATED:.1%}": f"{metrics['prediction']['saturation']:.1%}",
        "score-length Pearson": _show(metrics["length"]["pearson"], "+.2f"),
        "score-length Spearman": _show(metrics["length"]["spearman"], "+.2f"),
        "longer response is chosen": f"{metrics['length']['longer_wins']['accuracy']:.1%}",
        "longer response scores higher": _show(
            (metrics["length"]["prefers_longer"] or {}).get("accuracy"), ".1%"
        ),
        "rater agreement with majority": _show(metrics["agreement"]["mean"], ".1%"),
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
                for name, one in metrics["scores"].items()
            ),
        ]
    )


def _accuracy(one: dict[str, Any]) -> str:
    return f"{one['pairs']:9}{one['accuracy']:10.1%}   {one['low']:.1%} to {one['high']:.1%}"


def _show(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)

"""Rater agreement beyond chance, biases, and accuracy on golden questions."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from common.numeric.intervals import wilson
from step2_reward.annotate.click_log import Answers, Click
from step2_reward.pairs import Pair

Label = Hashable


def cohen_kappa(first: Sequence[Label], second: Sequence[Label]) -> float:
    """Agreement of two raters beyond chance on the same items: 1 perfect, 0 by chance.

    NaN when both use a single label only. Source: Cohen 1960.
    """
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts = Counter(first), Counter(second)
    expected = sum(counts[0][label] * counts[1][label] for label in counts[0]) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def fleiss_kappa(items: Sequence[Sequence[Label]]) -> tuple[float, float]:
    """Share of agreeing label pairs per item, averaged over items, and agreement beyond chance.

    items: two or more labels each. Source: Fleiss 1971, for equal numbers of labels. With unequal numbers,
    items weigh the same in the agreement, and labels in the chance agreement.
    """
    counts = [Counter(labels) for labels in items]
    sizes = [len(labels) for labels in items]
    agreeing = [
        sum(c * (c - 1) for c in count.values()) / (n * (n - 1))
        for count, n in zip(counts, sizes, strict=True)
    ]
    observed, total = sum(agreeing) / len(items), sum(counts, Counter())
    expected = sum((c / sum(sizes)) ** 2 for c in total.values())
    return observed, (observed - expected) / (1 - expected) if expected < 1 else math.nan


def agreement_metrics(answers: Answers, pairs: Iterable[Pair]) -> dict[str, Any]:
    """Compute metrics of each rater, each two raters, and all raters, without skipped pairs."""
    by_id = {pair.id: pair for pair in pairs}
    given = {
        rater: {name: click for name, click in clicks.items() if click.choice != "skip"}
        for rater, clicks in answers.items()
    }
    raters = {
        rater: {"skipped": len(answers[rater]) - len(clicks), **_rater_metrics(clicks, by_id)}
        for rater, clicks in given.items()
    }
    rater_pairs = {}
    for first, second in combinations(given, 2):
        both = [[given[rater][name].choice for rater in (first, second)] for name in given[first]
                if name in given[second]]  # fmt: skip
        if both:
            agreed = sum(a == b for a, b in both) / len(both)
            rater_pairs[first, second] = (len(both), agreed, cohen_kappa(*zip(*both, strict=True)))
    labels = [[clicks[name].choice for clicks in given.values() if name in clicks] for name in by_id]
    shared = [choices for choices in labels if len(choices) > 1]
    all_raters = (len(shared), *fleiss_kappa(shared)) if shared else None
    return {"raters": raters, "rater_pairs": rater_pairs, "all": all_raters}


def format_agreement(answers: Answers, pairs: Iterable[Pair]) -> str:
    """Format the metrics as tables."""
    metrics = agreement_metrics(answers, pairs)
    if not metrics["raters"]:
        return "no answers yet"
    names = [*metrics["raters"], *(f"{a}, {b}" for a, b in metrics["rater_pairs"]), "all raters"]
    width = max(map(len, names)) + 2
    heads = "answers  ties  skipped   left is better      longer is better    golden right"
    lines = [f"{'rater':{width}}{heads}"]
    for rater, one in metrics["raters"].items():
        shares = "".join(f"   {_format_share(*one[name]):17}" for name in ("left", "longer", "golden"))
        lines.append(f"{rater:{width}}{one['answers']:7}{one['ties']:6}{one['skipped']:9}{shares}".rstrip())
    lines += ["(95 % intervals. Sides are random: without bias, left is better in 50 %.)", ""]
    if metrics["all"] is None:
        return "\n".join([*lines, "agreement is undefined: no pair has answers of two raters"])
    lines.append(f"{'agreement':{width}}  pairs  percent   kappa")
    rows = {f"{a}, {b}": (*values, "Cohen") for (a, b), values in metrics["rater_pairs"].items()}
    for name, (count, agreed, kappa, kind) in {**rows, "all raters": (*metrics["all"], "Fleiss")}.items():
        kappa_text = "   none" if math.isnan(kappa) else f"{kappa:7.3f}"
        lines.append(f"{name:{width}}{count:7}{agreed:9.1%}{kappa_text}  {kind}")
    return "\n".join(lines)


def _rater_metrics(clicks: Mapping[str, Click], by_id: Mapping[str, Pair]) -> dict[str, Any]:
    """Count a rater's answers; (hits, trials) of left chosen, longer chosen, and golden questions right."""
    chosen = [click for click in clicks.values() if click.choice != "tie"]
    differ = [click for click in chosen if by_id[click.pair].longer]
    golden = [click for click in clicks.values() if by_id[click.pair].answer]
    return {
        "answers": len(clicks),
        "ties": len(clicks) - len(chosen),
        "left": (sum(click.choice == click.left for click in chosen), len(chosen)),
        "longer": (sum(click.choice == by_id[click.pair].longer for click in differ), len(differ)),
        "golden": (sum(click.choice == by_id[click.pair].answer for click in golden), len(golden)),
    }


def _format_share(hits: int, trials: int) -> str:
    if not trials:
        return "none"
    low, high = wilson(hits / trials, trials)
    return f"{hits / trials:4.0%} ({low:.0%} to {high:.0%})"

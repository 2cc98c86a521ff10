"""How far raters agree beyond chance, what sways them, and how often they are right. Figures, then text."""

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
    """Agreement of two raters beyond chance, on the same items: 1 perfect, 0 as by chance.

    NaN when both always say the same one thing. Source: Cohen 1960.
    """
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts = Counter(first), Counter(second)
    expected = sum(counts[0][label] * counts[1][label] for label in counts[0]) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def fleiss_kappa(items: Sequence[Sequence[Label]]) -> tuple[float, float]:
    """Share of agreeing pairs of labels per item, averaged over items, and how far that is beyond chance.

    items: the labels of each, two or more. Source: Fleiss 1971, where every item has as many labels; where
    numbers differ, items still count alike in the agreement, and labels alike in the chance of it.
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


def measure(answers: Answers, pairs: Iterable[Pair]) -> dict[str, Any]:
    """Figures of each rater, of every two, and of all. Skipped pairs count nowhere but as skipped."""
    known = {pair.id: pair for pair in pairs}
    said = {
        rater: {name: click for name, click in mine.items() if click.choice != "skip"}
        for rater, mine in answers.items()
    }
    raters = {
        rater: {"skipped": len(answers[rater]) - len(mine), **_rater(mine, known)}
        for rater, mine in said.items()
    }
    two = {}
    for first, second in combinations(said, 2):
        both = [[said[rater][name].choice for rater in (first, second)] for name in said[first]
                if name in said[second]]  # fmt: skip
        if both:
            agreed = sum(a == b for a, b in both) / len(both)
            two[first, second] = (len(both), agreed, cohen_kappa(*zip(*both, strict=True)))
    labels = [[mine[name].choice for mine in said.values() if name in mine] for name in known]
    shared = [choices for choices in labels if len(choices) > 1]
    everybody = (len(shared), *fleiss_kappa(shared)) if shared else None
    return {"raters": raters, "two": two, "all": everybody}


def describe(answers: Answers, pairs: Iterable[Pair]) -> str:
    """The figures as tables."""
    found = measure(answers, pairs)
    if not found["raters"]:
        return "no answers yet"
    names = [*found["raters"], *(f"{a}, {b}" for a, b in found["two"]), "all raters"]
    width = max(map(len, names)) + 2
    heads = "answers  ties  skipped   left is better      longer is better    golden right"
    lines = [f"{'rater':{width}}{heads}"]
    for rater, one in found["raters"].items():
        shares = "".join(f"   {_share(*one[name]):17}" for name in ("left", "longer", "golden"))
        lines.append(f"{rater:{width}}{one['answers']:7}{one['ties']:6}{one['skipped']:9}{shares}".rstrip())
    lines += [
        "(95 % intervals; sides are drawn at random, so that without a bias left is better in 50 %)",
        "",
    ]
    if found["all"] is None:
        return "\n".join([*lines, "no pair has answers of two raters, so there is no agreement to measure"])
    lines.append(f"{'agreement':{width}}  pairs  percent   kappa")
    rows = {f"{a}, {b}": (*figures, "Cohen") for (a, b), figures in found["two"].items()}
    for name, (count, agreed, kappa, kind) in {**rows, "all raters": (*found["all"], "Fleiss")}.items():
        shown = "   none" if math.isnan(kappa) else f"{kappa:7.3f}"
        lines.append(f"{name:{width}}{count:7}{agreed:9.1%}{shown}  {kind}")
    return "\n".join(lines)


def _rater(mine: Mapping[str, Click], known: Mapping[str, Pair]) -> dict[str, Any]:
    """A rater's counts, and as (hits, trials): left and longer one chosen, golden questions right."""
    chosen = [click for click in mine.values() if click.choice != "tie"]
    differ = [click for click in chosen if known[click.pair].longer]
    golden = [click for click in mine.values() if known[click.pair].answer]
    return {
        "answers": len(mine),
        "ties": len(mine) - len(chosen),
        "left": (sum(click.choice == click.left for click in chosen), len(chosen)),
        "longer": (sum(click.choice == known[click.pair].longer for click in differ), len(differ)),
        "golden": (sum(click.choice == known[click.pair].answer for click in golden), len(golden)),
    }


def _share(hits: int, trials: int) -> str:
    if not trials:
        return "none"
    low, high = wilson(hits / trials, trials)
    return f"{hits / trials:4.0%} ({low:.0%} to {high:.0%})"

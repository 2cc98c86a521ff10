"""Figures of a reward model, from the scores of held-out pairs. Pure numpy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from common.numeric.intervals import wilson

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LENGTH_RATIOS = (1.1, 2.0)  # of the longer response to the shorter: from which it is longer, and much longer
LENGTHS = ("chosen much shorter", "chosen shorter", "about equal", "chosen longer", "chosen much longer")
RATERS = ("divided", "unanimous")
CALIBRATION_BINS = 10
SATURATED = 0.999  # the sigmoid is flat beyond it, so that the loss teaches next to nothing there


class Judged(NamedTuple):
    """N preferences and what the model says of them; each field (N,)."""

    chosen_scores: np.ndarray  # float
    rejected_scores: np.ndarray
    chosen_lengths: np.ndarray  # int, tokens of the response
    rejected_lengths: np.ndarray
    margins: np.ndarray  # float, 0 where the data gives none
    is_tie: np.ndarray  # bool, neither is better
    sources: np.ndarray  # str, where the pair comes from
    agreement: np.ndarray  # float, share of the raters who agree with the majority; NaN without votes


def measure(judged: Judged, reward_std: float = 1.0) -> dict[str, Any]:
    """All figures, ready for JSON; None for one without a value, such as the correlation with a constant.

    Ties enter the spread of all scores, their relation to length and the mean agreement, and nothing else.
    reward_std: what the scores were divided by. Predicted probabilities are those of the loss, sigmoid of the
    difference of raw scores.
    Raises ValueError where a score is not finite, and where every pair is a tie.
    """
    scores = np.concatenate([judged.chosen_scores, judged.rejected_scores])
    if bad := int((~np.isfinite(scores)).sum()):
        raise ValueError(f"{bad} of {len(scores)} scores are not finite numbers")
    if judged.is_tie.all():
        raise ValueError("no pair has a better response, so there is no accuracy to measure")
    decided = Judged(*(field[~judged.is_tie] for field in judged))
    difference = decided.chosen_scores - decided.rejected_scores
    has_margin, has_votes = decided.margins != 0, ~np.isnan(decided.agreement)
    votes = judged.agreement[~np.isnan(judged.agreement)]
    return {
        "pairs": len(judged.is_tie),
        "ties": int(judged.is_tie.sum()),
        "accuracy": accuracy(difference),
        "accuracy_by": {
            "source": by_group(decided.sources, difference),
            "length": by_group(length_bucket(decided), difference, LENGTHS),
            "margin": by_quarter(decided.margins[has_margin], difference[has_margin]),
            "raters": by_group(decided.agreement[has_votes] == 1, difference[has_votes], RATERS),
        },
        "agreement": {"pairs": len(votes), "mean": float(votes.mean()) if len(votes) else None},
        "prediction": prediction(reward_std * difference),
        "length": length(judged, scores, accuracy(decided.chosen_lengths - decided.rejected_lengths)),
        "scores": {
            "all": spread(scores),
            "chosen": spread(decided.chosen_scores),
            "rejected": spread(decided.rejected_scores),
            "difference": spread(difference),
        },
    }


def accuracy(difference: np.ndarray) -> dict[str, Any]:
    """Share of differences (N,) above 0, those that are 0 counting half, and its 95 % interval.

    The interval is the score interval of Wilson 1927. It takes pairs to be independent: with several of one
    prompt it is too narrow.
    """
    pairs, share = len(difference), float((np.sign(difference) + 1).mean() / 2)
    low, high = wilson(share, pairs)
    return {"pairs": pairs, "accuracy": share, "low": low, "high": high}


def by_group(groups: np.ndarray, difference: np.ndarray, names: Sequence[str] = ()) -> dict[str, Any]:
    """Accuracy in each group: groups (N,) are names, or places in `names`; differences (N,)."""
    found = np.unique(groups)
    return {names[int(g)] if names else str(g): accuracy(difference[groups == g]) for g in found}


def length_bucket(judged: Judged) -> np.ndarray:
    """Place in LENGTHS of each pair, (N,), by the ratio of its response lengths."""
    chosen, rejected = np.maximum(judged.chosen_lengths, 1), np.maximum(judged.rejected_lengths, 1)
    degree = np.digitize(np.maximum(chosen, rejected) / np.minimum(chosen, rejected), LENGTH_RATIOS)
    return np.sign(chosen - rejected) * degree + 2


def by_quarter(margins: np.ndarray, difference: np.ndarray) -> dict[str, Any]:
    """Accuracy in each quarter of the margins (N,); equal margins stay together, so there may be fewer."""
    if not len(margins):
        return {}
    edges = np.unique(np.quantile(margins, [0.25, 0.5, 0.75]))
    found, quarter = np.unique(np.searchsorted(edges, margins), return_inverse=True)
    inside = [margins[quarter == q] for q in range(len(found))]
    ends = [dict.fromkeys((f"{m.min():.4g}", f"{m.max():.4g}")) for m in inside]  # one, where they are equal
    return by_group(quarter, difference, [" to ".join(names) for names in ends])


def prediction(difference: np.ndarray) -> dict[str, Any]:
    """How good the predicted probabilities p of the preferences are, from raw differences (N,).

    log_loss is in nats per pair. calibration_error is that of Guo et al. 2017, eq. 3: the mean distance from
    accuracy to mean confidence, max(p, 1 - p), in bins of equal width over the confidence. (As the chosen
    response always comes first, p has one class only; pairs in both orders would give the same error.)
    saturation is the share of pairs with a confidence above SATURATED.
    """
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    place = np.minimum((2 * confidence - 1) * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    inside = [place == i for i in np.unique(place)]
    bins = [{"confidence": float(confidence[i].mean()), **accuracy(difference[i])} for i in inside]
    gaps = [one["pairs"] * abs(one["accuracy"] - one["confidence"]) for one in bins]
    return {
        "log_loss": float(np.logaddexp(0, -difference).mean()),
        "confidence": float(confidence.mean()),
        "calibration_error": sum(gaps) / len(difference),
        "saturation": float((confidence > SATURATED).mean()),
        "bins": bins,
    }


def length(judged: Judged, scores: np.ndarray, longer_wins: dict[str, Any]) -> dict[str, Any]:
    """How scores (2N,) follow response lengths; how often the longer of two is right, and is preferred."""
    lengths = np.concatenate([judged.chosen_lengths, judged.rejected_lengths])
    longer = np.sign(judged.chosen_lengths - judged.rejected_lengths)
    follows = (longer * (judged.chosen_scores - judged.rejected_scores))[longer != 0]
    return {
        "pearson": correlation(scores, lengths),
        "spearman": correlation(ranks(scores), ranks(lengths)),
        "longer_wins": longer_wins,
        "prefers_longer": accuracy(follows) if len(follows) else None,
    }


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value (N,), from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's correlation of (N,) with (N,); None if one of them is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else None


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and percentiles of (N,)."""
    percentiles = zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True)
    return {"mean": float(values.mean()), "std": float(values.std()), **{f"p{p}": x for p, x in percentiles}}

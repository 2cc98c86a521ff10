"""Metrics of a reward model, from the scores of held-out pairs. Pure numpy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from common.numeric.intervals import wilson

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LENGTH_RATIOS = (1.1, 2.0)  # of the longer response to the shorter: thresholds of longer and much longer
LENGTHS = ("chosen much shorter", "chosen shorter", "about equal", "chosen longer", "chosen much longer")
RATERS = ("divided", "unanimous")
CALIBRATION_BINS = 10
SATURATED = 0.999  # beyond it the sigmoid is flat, and gradients vanish


class ScoredPairs(NamedTuple):
    """N preferences with their scores; each field (N,)."""

    chosen_scores: np.ndarray  # float
    rejected_scores: np.ndarray
    chosen_lengths: np.ndarray  # int, tokens of the response
    rejected_lengths: np.ndarray
    margins: np.ndarray  # float, 0 without a margin
    is_tie: np.ndarray  # bool
    sources: np.ndarray  # str, data file of the pair
    agreement: np.ndarray  # float, share of the raters who agree with the majority; NaN without votes


def reward_metrics(judged: ScoredPairs, reward_std: float = 1.0) -> dict[str, Any]:
    """Compute all metrics, ready for JSON; None where undefined, such as a correlation with a constant.

    Ties count only in the spread of all scores, the correlation with length and the mean agreement.
    reward_std: divisor of the raw scores. As in the loss, predicted probabilities are sigmoids of raw score
    differences. Raises ValueError if a score is not finite or every pair is a tie.
    """
    scores = np.concatenate([judged.chosen_scores, judged.rejected_scores])
    if bad := int((~np.isfinite(scores)).sum()):
        raise ValueError(f"{bad} of {len(scores)} scores are not finite numbers")
    if judged.is_tie.all():
        raise ValueError("all pairs are ties, so accuracy is undefined")
    decided = ScoredPairs(*(field[~judged.is_tie] for field in judged))
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
            "all": score_summary(scores),
            "chosen": score_summary(decided.chosen_scores),
            "rejected": score_summary(decided.rejected_scores),
            "difference": score_summary(difference),
        },
    }


def accuracy(difference: np.ndarray) -> dict[str, Any]:
    """Share of differences (N,) above 0, where 0 counts half, with its 95 % interval.

    The interval is Wilson's score interval (1927). It assumes independent pairs, so it is too narrow with
    several pairs per prompt.
    """
    pairs, share = len(difference), float((np.sign(difference) + 1).mean() / 2)
    low, high = wilson(share, pairs)
    return {"pairs": pairs, "accuracy": share, "low": low, "high": high}


def by_group(groups: np.ndarray, difference: np.ndarray, names: Sequence[str] = ()) -> dict[str, Any]:
    """Accuracy per group: groups (N,) are names, or indices of `names`; differences (N,)."""
    return {names[int(g)] if names else str(g): accuracy(difference[groups == g]) for g in np.unique(groups)}


def length_bucket(judged: ScoredPairs) -> np.ndarray:
    """Index in LENGTHS of each pair, (N,), by the ratio of its response lengths."""
    chosen, rejected = np.maximum(judged.chosen_lengths, 1), np.maximum(judged.rejected_lengths, 1)
    degree = np.digitize(np.maximum(chosen, rejected) / np.minimum(chosen, rejected), LENGTH_RATIOS)
    return np.sign(chosen - rejected) * degree + 2


def by_quarter(margins: np.ndarray, difference: np.ndarray) -> dict[str, Any]:
    """Accuracy per quartile of the margins (N,); fewer than four groups if many margins are equal."""
    if not len(margins):
        return {}
    edges = np.unique(np.quantile(margins, [0.25, 0.5, 0.75]))
    distinct, quarter = np.unique(np.searchsorted(edges, margins), return_inverse=True)
    inside = [margins[quarter == q] for q in range(len(distinct))]
    ends = [dict.fromkeys((f"{m.min():.4g}", f"{m.max():.4g}")) for m in inside]  # one if both are equal
    return by_group(quarter, difference, [" to ".join(names) for names in ends])


def prediction(difference: np.ndarray) -> dict[str, Any]:
    """Quality of the predicted preference probabilities p, from raw score differences (N,).

    log_loss: nats per pair. calibration_error: Guo et al. 2017, eq. 3, the mean distance between accuracy and
    mean confidence, max(p, 1 - p), over confidence bins of equal width. (Chosen responses come first, so p
    has one class only; pairs in both orders would give the same error.) saturation: share of pairs with a
    confidence above SATURATED.
    """
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    index = np.minimum((2 * confidence - 1) * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    inside = [index == i for i in np.unique(index)]
    bins = [{"confidence": float(confidence[i].mean()), **accuracy(difference[i])} for i in inside]
    gaps = [one["pairs"] * abs(one["accuracy"] - one["confidence"]) for one in bins]
    return {
        "log_loss": float(np.logaddexp(0, -difference).mean()),
        "confidence": float(confidence.mean()),
        "calibration_error": sum(gaps) / len(difference),
        "saturation": float((confidence > SATURATED).mean()),
        "bins": bins,
    }


def length(judged: ScoredPairs, scores: np.ndarray, longer_wins: dict[str, Any]) -> dict[str, Any]:
    """Correlation of scores (2N,) with length; how often the longer response is chosen, and scores higher."""
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
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's correlation of (N,) with (N,); None if one is constant."""
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else None


def score_summary(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and percentiles of (N,)."""
    percentiles = zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True)
    return {"mean": float(values.mean()), "std": float(values.std()), **{f"p{p}": x for p, x in percentiles}}

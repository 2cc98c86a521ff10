"""Figures that compare policies on the same prompts. Pure numpy."""

from math import comb, log
from typing import Any

import numpy as np

from common.numeric.intervals import Z95, wilson

NEWTON_STEPS = 200  # far more than a fit of two numbers takes
SMALLEST_STEP = 1e-9  # of these, on the scale of log odds
LEAST_SPREAD = 0.01  # of tanh, in -1 to 1; below it equal lengths are 100 spreads away, which tells nothing


def mean(values: np.ndarray) -> dict[str, float]:
    """Mean of N values, at least 2, and its 95 % interval by the normal approximation."""
    middle, half = values.mean(), Z95 * values.std(ddof=1) / len(values) ** 0.5
    return {"mean": float(middle), "low": float(middle - half), "high": float(middle + half)}


def wins(ours: np.ndarray, theirs: np.ndarray, longer: np.ndarray) -> dict[str, Any]:
    """How often ours scores higher than theirs, prompt by prompt: scores (N,) each.

    longer: (N,) by how many tokens our responses are longer. Win rates, 0 to 1, are over the prompts that are
    no tie, and None where all are. The 95 % interval of the plain one is the score interval of Wilson 1927.
    """
    decided = ours != theirs
    won = (ours > theirs)[decided]
    return {
        "wins": int(won.sum()),
        "ties": int((~decided).sum()),
        "losses": int((~won).sum()),
        "win_rate": win_rate(won),
        "at_equal_length": win_rate_at_equal_length(won, longer[decided]),
    }


def win_rate(won: np.ndarray) -> dict[str, float] | None:
    """The share of wins (N,) bool and its 95 % interval; None without any."""
    if not len(won):
        return None
    low, high = wilson(float(won.mean()), len(won))
    return {"mean": float(won.mean()), "low": low, "high": high}


def win_rate_at_equal_length(won: np.ndarray, longer: np.ndarray) -> dict[str, float] | None:
    """The win rate that length has no part in, and its 95 % interval: won (N,) bool, longer (N,) tokens.

    P(win) = sigmoid(a + b tanh(longer / std(longer))), read at 0, is sigmoid(a): the length-controlled win
    rate of Dubois et al. 2024 (arXiv 2404.04475, section 3), without the difficulty of instructions, which
    takes many models to tell. Both numbers are fitted by the penalised likelihood of Firth 1993, which has a
    maximum also where one side always wins; the interval is Wald's on the scale of a. None where one side is
    always so much longer that nothing tells the part of length.
    """
    if not longer.any():  # all at equal length
        return win_rate(won)
    length = np.tanh(longer / max(longer.std(), 1e-300))  # (N,)
    if (spread := length.std()) < LEAST_SPREAD:
        return None
    # Centred and scaled, which the likelihood does not see, both numbers are of order 1.
    x = np.stack([np.ones(len(length)), (length - length.mean()) / spread], axis=1)  # (N, 2)
    at_zero = np.array([1.0, -length.mean() / spread])
    fitted = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        p = _sigmoid(x @ fitted)  # (N,)
        variance = p * (1 - p)
        covariance = np.linalg.inv(x.T * variance @ x)  # (2, 2)
        leverage = variance * ((x @ covariance) * x).sum(1)  # (N,)
        slope = x.T @ (won - p + leverage * (0.5 - p))
        step, now = covariance @ slope, _likelihood(fitted, x, won)
        # Half as far, until the likelihood rises by a fair part of what its slope promises.
        while abs(step).max() > SMALLEST_STEP and _likelihood(fitted + step, x, won) < now + slope @ step / 4:
            step /= 2
        fitted += step
        if abs(step).max() <= SMALLEST_STEP:
            break
    logit, half = at_zero @ fitted, Z95 * (at_zero @ covariance @ at_zero) ** 0.5
    low, middle, high = (float(_sigmoid(logit + shift)) for shift in (-half, 0.0, half))
    return {"mean": middle, "low": low, "high": high}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # overflows nowhere


def _likelihood(numbers: np.ndarray, x: np.ndarray, won: np.ndarray) -> float:
    """Firth's penalised log-likelihood of two numbers, for regressors (N, 2) and wins (N,)."""
    logits = x @ numbers
    p = _sigmoid(logits)
    information = np.linalg.slogdet(x.T * (p * (1 - p)) @ x)
    return (won * logits - np.logaddexp(0, logits)).sum() + 0.5 * information.logabsdet


def best_of(picked_by: np.ndarray, judged_by: np.ndarray, n: int) -> np.ndarray:
    """Expected score of the best of n responses to each of P prompts, over all ways to draw n of N: (P,).

    picked_by, judged_by: scores (P, N) of the same responses; the first choose, the second are looked at. Of
    equally good ones each is as likely. Unbiased. Source: Nakano et al. 2021 (WebGPT), appendix I; Gao et al.
    2023, section 2.
    """
    total = picked_by.shape[1]
    below = np.array([comb(k, n) / comb(total, n) for k in range(total + 1)])  # all n among the k lowest
    ours, others = picked_by[:, :, None], picked_by[:, None, :]
    lower, not_higher = (others < ours).sum(2), (others <= ours).sum(2)  # (P, N)
    chance = (below[not_higher] - below[lower]) / (not_higher - lower)  # (P, N) to be the one picked
    return (chance * judged_by).sum(1)


def best_of_kl(n: int) -> float:
    """KL divergence in nats of the best of n from the policy that they are drawn from.

    Exact where scores are never equal, else the most that it can be. Source: Stiennon et al. 2020, appendix
    G.3; Beirami et al. 2024 (arXiv 2401.01879).
    """
    return log(n) - (n - 1) / n

"""Statistics of policies compared on the same prompts. Pure numpy."""

from math import comb, log
from typing import Any

import numpy as np

from common.numeric.intervals import Z95, wilson

NEWTON_STEPS = 200  # far more than a fit of two parameters takes
SMALLEST_STEP = 1e-9  # of Newton's method, in log odds
LEAST_SPREAD = 0.01  # of tanh, in -1 to 1; below it, equal length is an extrapolation by 100 spreads


def mean(values: np.ndarray) -> dict[str, float]:
    """Mean of N >= 2 values and its 95 % interval by the normal approximation."""
    average, half = values.mean(), Z95 * values.std(ddof=1) / len(values) ** 0.5
    return {"mean": float(average), "low": float(average - half), "high": float(average + half)}


def wins(ours: np.ndarray, theirs: np.ndarray, longer: np.ndarray) -> dict[str, Any]:
    """Win counts and win rates of ours against theirs, prompt by prompt: scores (N,) each.

    longer: (N,) how many tokens longer our responses are. Win rates, 0 to 1, leave out ties, and are None
    when all prompts are ties. The 95 % interval of `win_rate` is the score interval of Wilson 1927.
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
    """Share of wins (N,) bool and its 95 % interval; None when empty."""
    if not len(won):
        return None
    low, high = wilson(float(won.mean()), len(won))
    return {"mean": float(won.mean()), "low": low, "high": high}


def win_rate_at_equal_length(won: np.ndarray, longer: np.ndarray) -> dict[str, float] | None:
    """Length-controlled win rate and its 95 % interval. won (N,) bool; longer (N,) tokens.

    Fits P(win) = sigmoid(a + b tanh(longer / std(longer))); the win rate at equal length is sigmoid(a).
    Source: Dubois et al. 2024 (arXiv 2404.04475, section 3), without the term for the difficulty of
    instructions, whose fit needs many models. a and b maximise the penalised likelihood of Firth 1993, which
    has a maximum even when one side always wins; the interval is Wald's for a. None when one side is always
    much longer: then the effect of length cannot be separated.
    """
    if not longer.any():
        return win_rate(won)
    length = np.tanh(longer / max(longer.std(), 1e-300))  # (N,)
    if (spread := length.std()) < LEAST_SPREAD:
        return None
    # Centring and scaling leave the likelihood unchanged and make both parameters of order 1.
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
        # Halve the step until the likelihood rises by at least a quarter of the linear prediction.
        while abs(step).max() > SMALLEST_STEP and _likelihood(fitted + step, x, won) < now + slope @ step / 4:
            step /= 2
        fitted += step
        if abs(step).max() <= SMALLEST_STEP:
            break
    logit, half = at_zero @ fitted, Z95 * (at_zero @ covariance @ at_zero) ** 0.5
    low, rate, high = (float(_sigmoid(logit + shift)) for shift in (-half, 0.0, half))
    return {"mean": rate, "low": low, "high": high}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # never overflows


def _likelihood(parameters: np.ndarray, x: np.ndarray, won: np.ndarray) -> float:
    """Firth's penalised log-likelihood of the two parameters, for regressors (N, 2) and wins (N,)."""
    logits = x @ parameters
    p = _sigmoid(logits)
    information = np.linalg.slogdet(x.T * (p * (1 - p)) @ x)
    return (won * logits - np.logaddexp(0, logits)).sum() + 0.5 * information.logabsdet


def best_of(proxy: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Expected score of the best of n responses to each of P prompts, over all subsets of n out of N: (P,).

    proxy (P, N): scores that select the best response, equal ones with equal probability; scores (P, N): of
    the same responses, averaged. Unbiased. Source: Nakano et al. 2021 (WebGPT), appendix I; Gao et al. 2023,
    section 2.
    """
    total = proxy.shape[1]
    below = np.array([comb(k, n) / comb(total, n) for k in range(total + 1)])  # all n among the k lowest
    ours, others = proxy[:, :, None], proxy[:, None, :]
    lower, not_higher = (others < ours).sum(2), (others <= ours).sum(2)  # (P, N)
    chance = (below[not_higher] - below[lower]) / (not_higher - lower)  # (P, N) probability to be selected
    return (chance * scores).sum(1)


def best_of_kl(n: int) -> float:
    """KL divergence in nats of best of n from the policy that draws the responses.

    Exact when scores are never equal, else an upper bound. Source: Stiennon et al. 2020, appendix G.3;
    Beirami et al. 2024 (arXiv 2401.01879).
    """
    return log(n) - (n - 1) / n

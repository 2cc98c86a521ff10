"""Which of n responses to each of P prompts are kept, and which are compared. Pure numpy.

Best of n: Stiennon et al. 2020; to learn from it: RAFT, Dong et al. 2023 (arXiv 2304.06767), algorithm 1. All
that score enough: ReST, Gulcehre et al. 2023 (arXiv 2308.08998), algorithm 1, whose filter wants more than
the threshold; here as much will do, so that a quantile keeps something also where many score the same.
"""

from collections.abc import Sequence
from typing import assert_never

import numpy as np

USABLE, EMPTY, CUT, REPEATED = "usable", "empty", "cut", "repeated"


def sort_out(texts: Sequence[str], ended: Sequence[bool], keep_truncated: bool) -> list[str]:
    """Which of n responses to one prompt are usable, and why the others are not: empty, cut by the length
    limit (usable if keep_truncated), or the same as an earlier usable one.
    """
    verdicts: list[str] = []
    seen: set[str] = set()
    for text, has_ended in zip(texts, ended, strict=True):
        if not text.strip():
            verdicts.append(EMPTY)
        elif not has_ended and not keep_truncated:
            verdicts.append(CUT)
        else:
            verdicts.append(REPEATED if text in seen else USABLE)
            seen.add(text)
    return verdicts


def best(scores: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """The usable response with the highest score to each prompt, the first of equals: (P, n) bool.

    scores, usable: (P, n). To a prompt without a usable response there is none.
    """
    highest = np.where(usable, scores, -np.inf).argmax(1)  # (P,)
    return usable & (np.arange(scores.shape[1]) == highest[:, None])


def at_least(scores: np.ndarray, usable: np.ndarray, threshold: float) -> np.ndarray:
    """The usable responses that score no less than the threshold: (P, n) bool."""
    return usable & (scores >= threshold)


def worse(scores: np.ndarray, usable: np.ndarray, how: str, seed: Sequence[int]) -> np.ndarray:
    """What the best response to each prompt is to be preferred to: (P, n) bool, at most one for each.

    how: `worst`, the first of equals; `random`, any usable response with a lower score than the best, each as
    likely; `none`. Responses of equal score are no preference.
    """
    highest = np.where(usable, scores, -np.inf).max(1, keepdims=True)  # (P, 1)
    lower = usable & (scores < highest)
    match how:
        case "worst":
            return best(-scores, lower)
        case "random":
            return best(np.random.default_rng(seed).random(scores.shape), lower)
        case "none":
            return np.zeros_like(usable)
        case _:
            assert_never(how)

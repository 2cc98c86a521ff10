"""Selection of demonstrations and preferences from n responses to each of P prompts. Pure numpy.

Best of n: Stiennon et al. 2020; training on it: RAFT, Dong et al. 2023 (arXiv 2304.06767), algorithm 1.
Threshold: ReST, Gulcehre et al. 2023 (arXiv 2308.08998), algorithm 1, with >= instead of >, so that a
quantile selects responses even when many have the same score.
"""

from collections.abc import Sequence
from typing import assert_never

import numpy as np

USABLE, EMPTY, CUT, REPEATED = "usable", "empty", "cut", "repeated"


def classify(texts: Sequence[str], ended: Sequence[bool], keep_truncated: bool) -> list[str]:
    """Classify n responses to one prompt: usable, empty, cut by the length limit (usable with
    keep_truncated), or a repetition of an earlier usable one.
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
    """Mask (P, n) of the usable response with the highest score per prompt; the first one of equals.

    scores, usable: (P, n). A prompt without a usable response has no best one.
    """
    highest = np.where(usable, scores, -np.inf).argmax(1)  # (P,)
    return usable & (np.arange(scores.shape[1]) == highest[:, None])


def above(scores: np.ndarray, usable: np.ndarray, threshold: float) -> np.ndarray:
    """Mask (P, n) of the usable responses with a score of at least the threshold."""
    return usable & (scores >= threshold)


def rejected(scores: np.ndarray, usable: np.ndarray, how: str, seed: Sequence[int]) -> np.ndarray:
    """Mask (P, n) of the rejected response of each prompt, at most one; the best one is the chosen response.

    how: `worst`, the lowest score, the first one of equals; `random`, uniform over usable responses that
    score below the best; `none`. Responses of equal score make no pair.
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

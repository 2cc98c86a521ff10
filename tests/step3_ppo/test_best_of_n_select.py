"""What is kept of responses and what is compared, against loops over every response."""

import numpy as np
import pytest

from step3_ppo.best_of_n_select import at_least, best, usable_responses, worse

DRAW = np.random.default_rng(0)
SCORES = DRAW.integers(0, 4, (300, 5)).astype(float)  # many are equal
USABLE = DRAW.random((300, 5)) < 0.4


def groups() -> list[list[tuple[float, int]]]:
    """Score and number of the usable responses to each prompt."""
    return [
        [(score, i) for i, (score, ok) in enumerate(zip(*row, strict=True)) if ok]
        for row in zip(SCORES, USABLE, strict=True)
    ]


def numbers(mask: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in mask]


def test_what_can_be_learnt_from():
    texts, ended = ["a", " ", "a", "b", "b", "c"], [True, True, True, False, True, False]
    assert usable_responses(texts, ended, False) == [True, False, False, False, True, False]
    assert usable_responses(texts, ended, True) == [True, False, False, True, False, True]


def test_best_and_enough():
    tops = [[min(i for score, i in group if score == max(group)[0])] if group else [] for group in groups()]
    assert numbers(best(SCORES, USABLE)) == tops and [] in tops
    enough = [[i for score, i in group if score >= 2] for group in groups()]
    assert numbers(at_least(SCORES, USABLE, 2)) == enough


def test_pairs_have_no_ties():
    worst = numbers(worse(SCORES, USABLE, "worst", (0,)))
    for group, found in zip(groups(), worst, strict=True):
        lowest = [i for score, i in group if min(group)[0] == score < max(group)[0]]
        assert found == lowest[:1]
    assert not worse(SCORES, USABLE, "none", (0,)).any()


def test_a_random_one_is_any_that_is_worse():
    scores, usable = np.array([[3.0, 1, 2, 3, 0, 2]]), np.array([[True, True, True, True, True, False]])
    counts = np.zeros(6)
    for seed in range(3000):
        counts += worse(scores, usable, "random", (0, seed))[0]
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    assert counts[[1, 2, 4]] == pytest.approx(1000, abs=5 * (1000 * 2 / 3) ** 0.5)

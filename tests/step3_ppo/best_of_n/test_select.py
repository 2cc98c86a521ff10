"""Selection of demonstrations and pairs, compared with plain loops over every response."""

import numpy as np
import pytest

from step3_ppo.best_of_n.report import describe_selection
from step3_ppo.best_of_n.select import above, best, classify, rejected

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


def test_responses_are_classified():
    texts, ended = ["a", " ", "a", "b", "b", "c"], [True, True, True, False, True, False]
    assert classify(texts, ended, False) == ["usable", "empty", "repeated", "cut", "usable", "cut"]
    assert classify(texts, ended, True) == ["usable", "empty", "repeated", "usable", "repeated", "usable"]


def report(demonstrations: int, pairs: int, prompts: int, **unused: int) -> dict:
    return {
        "demonstrations": demonstrations, "samples": 148, "score_of_demonstrations": -1.259,
        "preferences": pairs,
        "score": {"mean": -2.656}, "selection": {"pairs": "worst"}, "max_response_length": 48, "prompts": 37,
        "prompts_with_demonstrations": prompts,
        "unused": {"cut": 0, "empty": 0, "repeated": 0} | unused,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        (report(1, 0, 1, cut=147),
         "kept 1 of 148 responses (mean score -1.259; all: -2.656), 0 pairs (no prompt has two usable"
         " responses of different scores); 147 cut at 48 tokens: pass --keep_truncated, or raise"
         " --max_response_length in another --output_dir"),
        (report(37, 37, 37), "kept 37 of 148 responses (mean score -1.259; all: -2.656), 37 pairs"),
        (report(36, 35, 36, cut=9, repeated=2),
         "kept 36 of 148 responses (mean score -1.259; all: -2.656), 35 pairs; 9 cut at 48 tokens,"
         " 2 identical to another response to the same prompt"),
        (report(10, 1, 10, empty=30, repeated=100),
         "kept 10 of 148 responses (mean score -1.259; all: -2.656), 1 pairs; 30 empty, 100 identical to"
         " another response to the same prompt: raise --temperature in another --output_dir"),
    ],
)  # fmt: skip
def test_report_gives_reasons_for_unused_responses(figures, text):
    assert describe_selection(figures) == text


def test_best_and_threshold():
    tops = [[min(i for score, i in group if score == max(group)[0])] if group else [] for group in groups()]
    assert numbers(best(SCORES, USABLE)) == tops and [] in tops
    expected = [[i for score, i in group if score >= 2] for group in groups()]
    assert numbers(above(SCORES, USABLE, 2)) == expected


def test_pairs_have_no_ties():
    worst = numbers(rejected(SCORES, USABLE, "worst", (0,)))
    for group, selected in zip(groups(), worst, strict=True):
        lowest = [i for score, i in group if min(group)[0] == score < max(group)[0]]
        assert selected == lowest[:1]
    assert not rejected(SCORES, USABLE, "none", (0,)).any()


def test_random_rejected_is_uniform_over_worse_responses():
    scores, usable = np.array([[3.0, 1, 2, 3, 0, 2]]), np.array([[True, True, True, True, True, False]])
    counts = np.zeros(6)
    for seed in range(3000):
        counts += rejected(scores, usable, "random", (0, seed))[0]
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    assert counts[[1, 2, 4]] == pytest.approx(1000, abs=5 * (1000 * 2 / 3) ** 0.5)

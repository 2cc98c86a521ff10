"""Agreement against published tables, and biases of constructed answers."""

import math

import pytest

from step2_reward.annotate.agreement import agreement_metrics, cohen_kappa, fleiss_kappa, format_agreement
from step2_reward.annotate.click_log import Answers, Click
from step2_reward.pairs import Pair

# Fleiss's example on Wikipedia: ten subjects, fourteen raters, five categories; kappa 0.210.
FLEISS = [
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
]  # fmt: skip


def labels(table: list[tuple[int, ...]]) -> list[list[int]]:
    """Expand label counts to labels."""
    return [[label for label, count in enumerate(row) for _ in range(count)] for row in table]


@pytest.mark.parametrize(
    ("table", "kappa"),  # both yes, first alone, second alone, both no: Cohen's kappa by its formula
    [((20, 5, 10, 15), 0.4), ((45, 15, 25, 15), 11 / 46 - 5 / 46), ((25, 35, 5, 35), 14 / 54)],
)
def test_cohen(table: tuple[int, ...], kappa: float) -> None:
    both, first, second, none = table
    one = [True] * (both + first) + [False] * (second + none)
    two = [True] * both + [False] * first + [True] * second + [False] * none
    assert cohen_kappa(one, two) == pytest.approx(kappa)
    assert cohen_kappa(one, one) == 1
    assert math.isnan(cohen_kappa(["A"] * 3, ["A"] * 3))


def test_fleiss() -> None:
    observed, kappa = fleiss_kappa(labels(FLEISS))
    assert observed == pytest.approx(0.378, abs=5e-4) and kappa == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([["A", "A", "A"], ["B", "B"]]) == (1, 1)
    assert fleiss_kappa([["A", "B"], ["B", "A"]]) == (0, -1)
    assert math.isnan(fleiss_kappa([["A", "A"]])[1])
    # Unequal numbers of labels: agreement (1 + 1/3) / 2; three of five labels are A.
    observed, kappa = fleiss_kappa([["A", "A"], ["A", "B", "B"]])
    expected = (3 / 5) ** 2 + (2 / 5) ** 2
    assert observed == pytest.approx(2 / 3) and kappa == pytest.approx((2 / 3 - expected) / (1 - expected))


def make_answers(choices: dict[str, str], lefts: str) -> tuple[Answers, list[Pair]]:
    """Make answers (A, B, t: tie, s: skip, dot: none) and pairs.

    Every fourth pair is golden with answer A; in the first half A is longer.
    """
    count = len(lefts)
    pairs = [
        Pair(str(n), {}, "p", {"A": "a" * (2 + (n < count // 2)), "B": "bb"}, "A" if n % 4 == 0 else "")
        for n in range(count)
    ]
    names = {"t": "tie", "s": "skip"}
    answers = {
        rater: {
            str(n): Click(f"{rater}{n}", "", rater, str(n), names.get(choice, choice), None, left)
            for n, (choice, left) in enumerate(zip(row, lefts, strict=True))
            if choice != "."
        }
        for rater, row in choices.items()
    }
    return answers, pairs


def test_biases_and_golden_questions() -> None:
    lefts = "ABABABAB"
    answers, pairs = make_answers({"lefty": lefts, "mixed": "AtsBAA.B", "shy": "ssssssss"}, lefts)
    metrics = agreement_metrics(answers, pairs)
    lefty, mixed, shy = metrics["raters"].values()
    assert lefty == {
        "skipped": 0, "answers": 8, "ties": 0, "left": (8, 8), "longer": (2, 4), "golden": (2, 2)
    }  # fmt: skip
    # mixed: A tie skip B | A A . B: left in 0, 3, 4 and 7; longer in 0, not in 3
    assert mixed == {
        "skipped": 1, "answers": 6, "ties": 1, "left": (4, 5), "longer": (1, 2), "golden": (2, 2)
    }  # fmt: skip
    assert (shy["answers"], shy["skipped"], shy["left"]) == (0, 8, (0, 0))
    assert list(metrics["rater_pairs"]) == [("lefty", "mixed")]
    shared, agreed, kappa = metrics["rater_pairs"]["lefty", "mixed"]
    # ABBABB against AtBAAB: 4 of 6 equal; chance (2 * 3 + 4 * 2) / 36
    assert (shared, agreed) == (6, pytest.approx(4 / 6)) and kappa == pytest.approx((24 - 14) / (36 - 14))
    assert metrics["all"][:2] == (6, pytest.approx(4 / 6))
    text = format_agreement(answers, pairs)
    assert "lefty, mixed" in text and "66.7%" in text and f"{10 / 22:.3f}" in text and "Fleiss" in text
    assert "100% (68% to 100%)" in text  # Wilson's interval of 8 of 8


def test_undefined_agreement_is_reported() -> None:
    assert format_agreement({}, []) == "no answers yet"
    answers, pairs = make_answers({"one": "AB"}, "AA")
    assert "agreement is undefined" in format_agreement(answers, pairs)
    answers, pairs = make_answers({"one": "AA", "two": "AA"}, "AB")
    assert "100.0%   none  Cohen" in format_agreement(answers, pairs)

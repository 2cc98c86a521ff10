"""Agreement against published tables, and what sways raters on answers that were made to show it."""

import math

import pytest

from step2_reward.annotate.agreement import cohen_kappa, describe, fleiss_kappa, measure
from step2_reward.annotate.click_log import Answers, Click
from step2_reward.pairs import Pair

# Fleiss's example as Wikipedia has it: ten subjects, fourteen raters, five categories; kappa 0.210.
FLEISS = [
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
]  # fmt: skip


def labels(table: list[tuple[int, ...]]) -> list[list[int]]:
    """From counts of each label to the labels."""
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
    # Numbers of labels that differ: agreement (1 + 1/3) / 2; of five labels three are A.
    observed, kappa = fleiss_kappa([["A", "A"], ["A", "B", "B"]])
    expected = (3 / 5) ** 2 + (2 / 5) ** 2
    assert observed == pytest.approx(2 / 3) and kappa == pytest.approx((2 / 3 - expected) / (1 - expected))


def made(choices: dict[str, str], lefts: str) -> tuple[Answers, list[Pair]]:
    """Answers (A, B, tie by t, skip by s, none by a dot) of raters to pairs of which every fourth is golden,
    with answer A, and in the first half of which A is longer."""
    count = len(lefts)
    pairs = [
        Pair(str(n), {}, "p", {"A": "a" * (2 + (n < count // 2)), "B": "bb"}, "A" if n % 4 == 0 else "")
        for n in range(count)
    ]
    names = {"t": "tie", "s": "skip"}
    answers = {
        rater: {
            str(n): Click(f"{rater}{n}", "", rater, str(n), names.get(choice, choice), None, left)
            for n, (choice, left) in enumerate(zip(said, lefts, strict=True))
            if choice != "."
        }
        for rater, said in choices.items()
    }
    return answers, pairs


def test_biases_and_golden_questions() -> None:
    lefts = "ABABABAB"
    answers, pairs = made({"lefty": lefts, "mixed": "AtsBAA.B", "shy": "ssssssss"}, lefts)
    found = measure(answers, pairs)
    lefty, mixed, shy = found["raters"].values()
    assert lefty == {
        "skipped": 0, "answers": 8, "ties": 0, "left": (8, 8), "longer": (2, 4), "golden": (2, 2)
    }  # fmt: skip
    # mixed: A tie skip B | A A . B: the left one in 0, 3, 4 and 7; the longer one in 0, not in 3
    assert mixed == {
        "skipped": 1, "answers": 6, "ties": 1, "left": (4, 5), "longer": (1, 2), "golden": (2, 2)
    }  # fmt: skip
    assert (shy["answers"], shy["skipped"], shy["left"]) == (0, 8, (0, 0))
    assert list(found["two"]) == [("lefty", "mixed")]
    shared, agreed, kappa = found["two"]["lefty", "mixed"]
    # ABBABB against AtBAAB: 4 of 6 alike; chance (2 * 3 + 4 * 2) / 36
    assert (shared, agreed) == (6, pytest.approx(4 / 6)) and kappa == pytest.approx((24 - 14) / (36 - 14))
    assert found["all"][:2] == (6, pytest.approx(4 / 6))
    text = describe(answers, pairs)
    assert "lefty, mixed" in text and "66.7%" in text and f"{10 / 22:.3f}" in text and "Fleiss" in text
    assert "100% (68% to 100%)" in text  # Wilson's interval of 8 of 8


def test_what_there_is_not_is_said() -> None:
    assert describe({}, []) == "no answers yet"
    answers, pairs = made({"one": "AB"}, "AA")
    assert "no agreement to measure" in describe(answers, pairs)
    answers, pairs = made({"one": "AA", "two": "AA"}, "AB")
    assert "100.0%   none  Cohen" in describe(answers, pairs)

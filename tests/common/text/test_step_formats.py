"""Labelled steps of PRM800K and Math-Shepherd; the records are made here, in the form of theirs."""

import pytest

from common.text.record_formats import normalise_record

SHEPHERD = {
    "input": "Ann has 3 pens and buys 2. How many? Step 1: 3 + 2 = 5 ки\nStep 2: The answer is: 6 ки",
    "label": "Ann has 3 pens and buys 2. How many? Step 1: 3 + 2 = 5 +\nStep 2: The answer is: 6 -",
    "task": "GSM8K",
}


def completion(text: str, rating: int | None) -> dict:
    return {"text": text, "rating": rating, "flagged": False}


def prm800k(*steps: dict) -> dict:
    return {"question": {"problem": "2 + 3 - 1?"}, "label": {"steps": [*steps], "finish_reason": "solution"}}


def test_math_shepherd() -> None:
    assert normalise_record(SHEPHERD) == {
        "prompt": "Ann has 3 pens and buys 2. How many?\n",
        "steps": ["Step 1: 3 + 2 = 5", "Step 2: The answer is: 6"],
        "labels": [1, 0],
    }


@pytest.mark.parametrize(
    "change",
    [
        {"label": SHEPHERD["label"].replace("-", "?")},
        {"label": SHEPHERD["label"][:-20]},
        {name: SHEPHERD[name].replace("Step 1:", "First,") for name in ("input", "label")},
    ],
)
def test_damaged_math_shepherd_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="as in Math-Shepherd"):
        normalise_record(SHEPHERD | change)


def test_prm800k_follows_the_chosen_completions() -> None:
    """Neutral steps have no label; a step without a choice ends the path; a person may write a step."""
    record = prm800k(
        {"completions": [completion("x", -1), completion("2 + 3 = 5", 1)], "chosen_completion": 1},
        {"completions": [completion("So far 5", 0)], "chosen_completion": 0},
        {
            "completions": [completion("y", -1)], "chosen_completion": None,
            "human_completion": completion("Now subtract", None),
        },
        {"completions": [completion("5 - 1 = 3", -1), completion("z", 1)], "chosen_completion": None},
        {"completions": [completion("never", 1)], "chosen_completion": 0},
    )  # fmt: skip
    assert normalise_record(record) == {
        "prompt": "2 + 3 - 1?\n",
        "steps": ["2 + 3 = 5", "So far 5", "Now subtract", "5 - 1 = 3"],
        "labels": [1, None, 1, 0],
    }


def test_damaged_prm800k_is_refused() -> None:
    for damaged in ({"completions": [], "chosen_completion": 0}, {"completions": None}, "text"):
        with pytest.raises(ValueError, match="not those of a PRM800K record"):
            normalise_record(prm800k(damaged))

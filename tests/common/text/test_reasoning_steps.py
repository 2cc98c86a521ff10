"""Where steps end in the tokens of a response: by hand, and against a scan of all tokens."""

import random
from collections.abc import Sequence

import pytest

from common.text.reasoning_steps import step_ends


def ends_of(pieces: Sequence[str], separator: str = "\n") -> list[int]:
    """Step ends in a response whose tokens have these texts."""
    return step_ends([*range(len(pieces))], separator, lambda ids: "".join(pieces[i] for i in ids))


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["1+2", "=3", "\n", "3-1=2"], [2, 4]),  # the last step ends at the end token
        (["a", "\n"], [1]),
        (["a\n", "b", "\n"], [0, 2]),
        (["a", "\nb", "c"], [1, 3]),  # a token that begins the next step
        (["a", "\n", "\n", "b"], [1, 4]),  # blank steps do not count
        (["a", "\n\n", "b"], [1, 3]),
        (["\n", "a"], [2]),
        (["a", "\n", " "], [1]),
        ([], [0]),
        ([" "], [1]),
    ],
)
def test_ends_by_hand(pieces: list[str], expected: list[int]) -> None:
    assert ends_of(pieces) == expected


def test_a_separator_of_several_tokens_ends_a_step_at_its_last_one() -> None:
    assert ends_of(["a\n", "\nb", "\n", "c\n\n"], "\n\n") == [1, 3]
    assert ends_of(["a", " k", "i", "b"], " ki") == [2, 4]


@pytest.mark.parametrize("separator", ["\n", "\n\n", "a", "ab"])
def test_ends_equal_those_of_a_scan(separator: str) -> None:
    draw = random.Random(separator)
    for _ in range(300):
        pieces = ["".join(draw.choices("ab \n", k=draw.randint(1, 3))) for _ in range(draw.randint(0, 12))]
        expected, text = [], ""
        for number, piece in enumerate(pieces):
            text += piece
            if separator in text:
                expected += [number] if text.replace(separator, " ").strip() else []
                text = ""
        assert ends_of(pieces, separator) == expected + [len(pieces)] * (not expected or bool(text.strip()))

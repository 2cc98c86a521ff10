"""Arithmetic in steps, by hand."""

import random

from tests.chains import (
    answer_lines,
    as_steps,
    compared,
    is_right,
    labels,
    make_question,
)

QUESTION = "7+5-3+4:"
RIGHT = ["7+5=12", "12-3=9", "9+4=13"]


def test_answers_and_labels_by_hand() -> None:
    assert answer_lines(QUESTION) == RIGHT and labels(QUESTION, RIGHT) == [1, 1, 1]
    assert labels(QUESTION, ["7+5=12", "12-3=8", "8+4=12"]) == [1, 0, None]
    assert labels(QUESTION, ["7+5=13", "13-3=10", "10+4=14"]) == [0, None, None]
    assert labels(QUESTION, ["7+5=12", "12-3=9", "9+4=12"]) == [1, 1, 0]
    lucky = "7+5=13\n13-3=9\n9+4=13"
    assert is_right(QUESTION, lucky) and is_right(QUESTION, "\n".join(RIGHT))
    assert not is_right(QUESTION, lucky + "3")


def test_compared_answers_differ_in_their_results() -> None:
    draw = random.Random(0)
    for record in compared(draw, 50, 4, 0.2):
        right, wrong = (is_right(record["prompt"], "\n".join(record[s])) for s in ("chosen", "rejected"))
        assert right and not wrong
        _, rejected = as_steps(record)
        assert 0 in rejected["labels"] and len(rejected["labels"]) == 4
    assert all(0 <= int(line.split("=")[1]) <= 30 for line in answer_lines(make_question(draw, 9)))

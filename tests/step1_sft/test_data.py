"""Loss masks of demonstrations, and their positions in a batch."""

import pytest

from common.text.truncation import Dropped
from step1_sft.data import Demonstration, collate, tokenize_demonstration
from tests.word_encoder import EOS, PAD, WordEncoder


def tokenise(
    record: dict, max_length: int = 64, overlong: str = "truncate_response", loss_on: str = "response"
) -> Demonstration | None:
    try:
        return tokenize_demonstration(record, WordEncoder(), max_length, overlong, loss_on)[0]
    except Dropped:
        return None


def test_only_the_response_and_its_eos_are_trained():
    row = tokenise({"prompt": "three words here", "completion": "two more"})
    assert row.ids == [10, 11, 12, 13, 14, EOS]
    assert row.is_trained == [False, False, False, True, True, True]
    assert row.prompt_ids == [10, 11, 12]


def test_every_assistant_turn_is_trained():
    turns = [("user", "hello there"), ("assistant", "hi"), ("user", "bye"), ("assistant", "so long")]
    row = tokenise({"messages": [{"role": role, "content": content} for role, content in turns]})
    #          user : hello there assistant : | hi EOS | user : bye assistant : | so long EOS
    assert row.is_trained == [False] * 6 + [True] * 2 + [False] * 5 + [True] * 3
    assert row.prompt_ids == row.ids[:6]


def test_loss_on_all_tokens_leaves_out_the_first():
    row = tokenise({"prompt": "three words here", "completion": "two more"}, loss_on="prompt_and_response")
    assert row.is_trained == [False, True, True, True, True, True]


def test_truncation_keeps_the_beginning():
    long = "w " * 20
    row = tokenise({"prompt": "three words here", "completion": long}, max_length=8)
    assert row.ids == list(range(10, 18))
    assert row.is_trained == [False] * 3 + [True] * 5


@pytest.mark.parametrize("words, left", [(7, True), (8, False), (30, False)])
def test_truncation_that_leaves_no_response_drops_the_record(words, left):
    row = tokenise({"prompt": "w " * words, "completion": "answer"}, max_length=8)
    assert (row is not None) == left


def test_collate_aligns_positions_with_labels():
    rows = [
        Demonstration([10, 11, 12, 13, EOS], [False, False, True, True, True]),
        Demonstration([20, 21, EOS], [False, True, True]),
        Demonstration([30, 31, 32, 33], [False, True, False, True]),  # two turns
    ]
    batch = collate([[row] for row in rows], PAD)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, EOS], [20, 21, EOS, PAD, PAD], [30, 31, 32, 33, PAD]]
    assert batch.positions.int().tolist() == [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]
    assert batch.labels.tolist() == [12, 13, EOS, 21, EOS, 31, 33]


def test_a_pad_id_inside_a_row_is_trained():
    """Masks come from lengths, not from the pad id."""
    rows = [Demonstration([10, PAD, PAD], [False, True, True]), Demonstration([20, 21], [False, True])]
    batch = collate([[row] for row in rows], PAD)
    assert batch.labels.tolist() == [PAD, PAD, 21]
    assert batch.positions.int().tolist() == [[1, 1, 0], [1, 0, 0]]

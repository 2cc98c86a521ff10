"""How a pair is cut to length, and where its sides stand in a batch."""

import pytest

from common.formatting import Segment
from step2_reward.data import Preference, collate, fit, preference
from step2_reward.options import RewardOptions
from tests.conftest import assert_close
from tests.word_encoder import EOS, PAD, WordEncoder


def cut(prompt_words: int, response_words: int, max_length: int) -> list[int]:
    segments = [Segment("w " * prompt_words), Segment("w " * response_words, is_response=True, ends=True)]
    return fit(segments, WordEncoder(), max_length)


def test_what_fits_is_left_alone():
    assert cut(3, 2, 6) == [10, 11, 12, 13, 14, EOS]


def test_a_long_prompt_loses_its_beginning():
    assert cut(6, 2, 5) == [14, 15, 16, 17, EOS]


def test_a_long_response_loses_its_end_but_not_eos():
    assert cut(3, 9, 6) == [12, 13, 14, 15, 16, EOS]


@pytest.mark.parametrize("max_length", [8, 9, 13])
def test_never_too_long_and_always_ending_in_eos(max_length):
    for prompt_words in range(1, 16):
        for response_words in range(1, 16):
            ids = cut(prompt_words, response_words, max_length)
            assert len(ids) == min(prompt_words + response_words + 1, max_length)
            assert ids[-1] == EOS and ids.count(EOS) == 1
            assert ids[0] < 10 + prompt_words, "a token of the prompt stays"


def test_margin_enters_only_when_asked_for():
    record = {"prompt": "a b", "chosen": "c", "rejected": "d e", "margin": 1.5}
    plain = preference(record, WordEncoder(), RewardOptions())
    assert plain == ([10, 11, 12, EOS], [10, 11, 12, 13, EOS], 0.0, False)
    assert plain.length == 5
    assert preference(record, WordEncoder(), RewardOptions(use_margin=True)).margin == 1.5
    record["margin"] = "much"
    assert preference(record, WordEncoder(), RewardOptions()).margin == 0.0
    with pytest.raises(ValueError, match="'margin' is 'much'"):
        preference(record, WordEncoder(), RewardOptions(use_margin=True))


def test_collate_puts_chosen_rows_before_rejected_ones():
    batch = collate([Preference([2, 3, EOS], [4, EOS], 0.5), Preference([5, EOS], [6, 7, 8, EOS], 0.0)], PAD)
    chosen, rejected = [[2, 3, EOS, PAD], [5, EOS, PAD, PAD]], [[4, EOS, PAD, PAD], [6, 7, 8, EOS]]
    assert batch.input_ids.tolist() == chosen + rejected
    assert batch.lengths.tolist() == [3, 2, 2, 4]
    assert_close(batch.margins.cpu().tolist(), [0.5, 0.0])

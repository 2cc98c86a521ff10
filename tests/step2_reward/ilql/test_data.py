"""Scored responses: tokens, actions and rewards."""

import pytest
import torch

from common.runtime.options import UserError
from common.text.record_formats import normalise_record
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped
from step2_reward.ilql.data import Scale, ScoredResponse, collate, scale_of, tokenize_scored
from tests.byte_encoder import byte_encoder

RECORD = {"prompt": "Hi?", "response": " No.", "score": 0.5}


class Rows(list):
    """Rows with their scores as a column."""

    def column(self, name: str):
        return torch.tensor([getattr(row, name) for row in self], dtype=torch.float64).numpy()


@pytest.fixture(scope="module")
def encoder() -> SegmentEncoder:
    return byte_encoder(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def convert(record: dict, encoder: SegmentEncoder, **settings: object) -> ScoredResponse:
    settings = {"max_length": 99, "overlong": "truncate_prompt", **settings}
    return tokenize_scored(normalise_record(record), encoder, **settings)[0]


def actions(row: ScoredResponse, encoder: SegmentEncoder) -> str:
    return encoder.decode([token for token, one in zip(row.ids, row.is_response, strict=True) if one])


def test_actions_are_the_tokens_of_the_response_with_eos(encoder: SegmentEncoder) -> None:
    row = convert(RECORD, encoder)
    assert actions(row, encoder) == " No.</s>" and row.score == 0.5 and row.num_actions == 5
    renamed = {"prompt": "Hi?", "completion": " No.", "score": "0.5"}  # as best of n and CSV files have it
    assert convert(renamed, encoder) == row
    assert actions(convert({**RECORD, "completion": " Yes", "ended": False}, encoder), encoder) == " Yes"
    asked = [{"role": "user", "content": "Hi?"}]
    row = convert({**RECORD, "prompt": asked, "response": "No."}, encoder)
    assert encoder.decode(row.ids) == "<user>Hi?</s><assistant>No.</s>" and actions(row, encoder) == "No.</s>"
    as_turn = {**RECORD, "prompt": asked, "response": [{"from": "gpt", "value": "No."}]}
    assert convert(as_turn, encoder) == row


def test_all_turns_of_the_assistant_are_actions(encoder: SegmentEncoder) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert actions(convert({"messages": messages, "score": 1}, encoder), encoder) == "b</s>d</s>"


@pytest.mark.parametrize("value", ["good", None, True, "nan", [1], ""])
def test_scores_that_are_no_numbers(encoder: SegmentEncoder, value: object) -> None:
    with pytest.raises(ValueError, match="field 'score' is .* it must be a number"):
        convert({**RECORD, "score": value}, encoder)
    with pytest.raises(ValueError, match="field 'score' is 2e\\+06; allowed: -1e\\+06 to 1e\\+06"):
        convert({**RECORD, "score": 2e6}, encoder)


@pytest.mark.parametrize(("name", "message"), [
    ("score", "field 'score' is missing \\(a scored response has"),
    ("response", "field 'completion' is missing"), ("prompt", "field 'prompt' is missing"),
])  # fmt: skip
def test_missing_fields(encoder: SegmentEncoder, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert({key: value for key, value in RECORD.items() if key != name}, encoder)


@pytest.mark.parametrize("response", ["", " ", []])
def test_an_empty_response_has_the_name_of_its_field(encoder: SegmentEncoder, response: object) -> None:
    turns = [{"role": "user", "content": "Hi?"}]
    prompt = turns if isinstance(response, list) else "Hi?"
    with pytest.raises(ValueError, match="field 'response' is empty"):
        convert({"prompt": prompt, "response": response, "score": 1}, encoder)
    assert actions(convert({**RECORD, "response": "null"}, encoder), encoder) == "null</s>"


def test_long_records(encoder: SegmentEncoder) -> None:
    cut = convert(RECORD, encoder, max_length=6, overlong="truncate_response")
    assert actions(cut, encoder) == " No"
    with pytest.raises(Dropped):
        convert(RECORD, encoder, max_length=6, overlong="drop")


def test_batch_by_hand() -> None:
    """Rewards are standardised scores, at the last action of each dialogue, also after an earlier turn."""
    one = ScoredResponse([5, 6, 7, 8, 9], [False, True, False, True, True], 3.0)
    two = ScoredResponse([8, 9], [False, True], -1.0)
    batch = collate([one, two], pad_token_id=0, scale=Scale(1.0, 2.0))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch.actions.tolist() == [6, 8, 9, 9]
    assert batch.is_last.tolist() == [False, False, True, True]
    assert batch.rewards.tolist() == [0.0, 0.0, 1.0, -1.0]


def test_scale_of_scores() -> None:
    rows = Rows(ScoredResponse([1, 2], [False, True], score) for score in (1.0, 2.0, 6.0))
    assert scale_of(rows, True, ["F"]) == pytest.approx((3.0, (14 / 3) ** 0.5))
    assert scale_of(rows, False, ["F"]) == (0.0, 1.0)
    equal = Rows(ScoredResponse([1, 2], [False, True], 0.1) for _ in range(7))
    assert scale_of(equal, False, ["F"]) == (0.0, 1.0)
    with pytest.raises(UserError, match="F: all scores are 0.1; ILQL learns"):
        scale_of(equal, True, ["F"])

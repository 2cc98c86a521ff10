"""Labelled steps: tokens and labels of records, and their layout in a batch."""

import pytest
import torch

from common.text.record_formats import normalise_record
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.text.truncation import Dropped
from step2_reward.process.data import LabelledSteps, collate, tokenize_steps
from tests.byte_encoder import byte_encoder

RECORD = {"prompt": "2+3-1:", "steps": ["2+3=5", "5-1=3"], "labels": [1, 0]}
MESSAGES = {**RECORD, "prompt": [{"role": "user", "content": "2+3-1"}]}


@pytest.fixture(scope="module")
def encoder() -> SegmentEncoder:
    """Bytes, and a template whose turns end in a token, a line end and EOS."""
    return byte_encoder(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
    )


def convert(record: dict, encoder: SegmentEncoder, **settings: object) -> LabelledSteps:
    settings = {"max_length": 99, "overlong": "truncate_prompt", "separator": "\n", **settings}
    return tokenize_steps(normalise_record(record), encoder, **settings)[0]


def texts(row: LabelledSteps, encoder: SegmentEncoder) -> list[str]:
    """What stands before each step's last token, with it, from the end of the step before."""
    begins = [0, *(end + 1 for end in row.ends)]
    return [encoder.decode(row.ids[begin : end + 1]) for begin, end in zip(begins, row.ends, strict=False)]


def test_a_step_ends_at_its_separator_and_the_last_one_at_eos(encoder: SegmentEncoder) -> None:
    row = convert(RECORD, encoder)
    assert texts(row, encoder) == ["2+3-1:2+3=5\n", "5-1=3</s>"] and row.labels == [1.0, 0.0]
    row = convert(MESSAGES, encoder)
    assert texts(row, encoder) == ["<user>2+3-1<|end|>\n<assistant>2+3=5\n", "5-1=3<|end|>\n</s>"]


def test_separators_at_the_ends_of_steps_and_the_name_completions_change_nothing(
    encoder: SegmentEncoder,
) -> None:
    row = convert(RECORD, encoder)
    named = {"prompt": "2+3-1:", "completions": ["2+3=5\n", "5-1=3\n"], "labels": [True, False]}
    assert convert(named, encoder) == row
    as_text = {**RECORD, "steps": '["2+3=5", "5-1=3"]', "labels": "[1, 0]"}  # as in CSV files
    assert convert(as_text, encoder) == row


def test_steps_without_a_label_are_left_out(encoder: SegmentEncoder) -> None:
    row = convert({**RECORD, "labels": [None, 0.25]}, encoder)
    assert row.ends == [len(row.ids) - 1] and row.labels == [0.25]
    with pytest.raises(Dropped, match="no labelled step"):
        convert({**RECORD, "labels": [None, None]}, encoder)


def test_a_step_that_is_cut_has_no_label(encoder: SegmentEncoder) -> None:
    full = convert(RECORD, encoder)
    cut = convert(RECORD, encoder, overlong="truncate_response", max_length=len(full.ids) - 1)
    assert (cut.ends, cut.labels) == (full.ends[:1], [1.0]) and cut.ids[-1] == encoder.eos_token_id
    with pytest.raises(Dropped, match="no labelled step"):
        convert(RECORD, encoder, overlong="truncate_response", max_length=full.ends[0])
    shorter = convert(RECORD, encoder, max_length=len(full.ids) - 2)  # of the prompt
    assert shorter.ends == [end - 2 for end in full.ends] and shorter.labels == full.labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1]}, "must be a list of 2 labels"),
        ({"labels": [1, 2]}, "that of step 2 is 2; allowed"),
        ({"labels": [1, "+"]}, "that of step 2 is '\\+'"),
        ({"steps": ["a", " "]}, "step 2 is ' '; it must be text"),
        ({"steps": [], "labels": []}, "must be a list of one step or more"),
        ({"steps": ["a\nb", "c"]}, "step 1 contains --step_separator '\\\\n'"),
        ({"steps": None}, "'steps' must be a list"),
    ],
)
def test_bad_records(encoder: SegmentEncoder, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(RECORD | change, encoder)
    for name in RECORD:
        with pytest.raises(ValueError, match=f"field '{name}' is missing"):
            convert({key: value for key, value in RECORD.items() if key != name}, encoder)


@pytest.mark.parametrize("name", ["smollm2", "sp-unigram-1k"])
@pytest.mark.parametrize("separator", ["\n", "\n\n", " ки"])
def test_steps_of_real_tokenizers(shared, name: str, separator: str) -> None:
    """Some merge a separator with what stands beside it; each step must still be in front of its end."""
    encoder = SegmentEncoder(load_tokenizer(str(shared / "tokenizers" / name)))
    steps = ["First we add 2 and 3.", "(5)", "- then 5-1=4:", "The answer is 4"]
    record = {"prompt": "What is 2+3-1?", "steps": steps, "labels": [1, 1, 1, 0]}
    try:
        row = convert(record, encoder, separator=separator)
    except ValueError as error:  # a tokenizer that makes every line end a space
        assert "changes --step_separator" in str(error) and name == "sp-unigram-1k"
        return
    for number, end in enumerate(row.ends):
        text = encoder.decode(row.ids[: end + 1])
        assert text.rstrip().count(steps[number][-5:].strip()) >= 1
        assert number == 3 or text.count(separator) == number + 1


def test_batch_by_hand() -> None:
    """Up to the first wrong step, all of a record count for finding its first error."""
    one = LabelledSteps([5, 6, 7], [0, 2], [0.0, 1.0])
    two = LabelledSteps([8, 9, 10, 11, 12], [1, 3, 4], [1.0, 0.4, 0.0])
    batch = collate([one, two], pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]
    assert batch.rows.tolist() == [0, 0, 1, 1, 1] and batch.columns.tolist() == [0, 2, 1, 3, 4]
    assert torch.equal(batch.labels, torch.tensor([0.0, 1.0, 1.0, 0.4, 0.0]))
    assert batch.until_error.tolist() == [True, False, True, True, False]
    assert LabelledSteps([1], [0], [1.0]).num_until_error == 1

"""Records to dialogues, pairs and labels, and refused records."""

import pytest

from common.text.record_formats import normalise_record
from common.text.truncation import Dropped
from step2_reward.direct.data import Choice, Dialogue, tokenize_paired, tokenize_unpaired
from tests.word_encoder import EOS, WordEncoder

FIT = {"encoder": WordEncoder(), "max_length": 100, "overlong": "truncate_prompt"}
RANKING = {"prompt": "a b", "responses": ["w", "x y", "z", "v"], "ranks": [3, 1, 2, 1]}


def test_a_pair_is_two_dialogues_better_first():
    row, truncated = tokenize_paired({"prompt": "a b", "chosen": "c d", "rejected": "e"}, **FIT)
    assert row.dialogues == [Dialogue([10, 11, 12, 13, EOS], 2), Dialogue([10, 11, 12, EOS], 2)]
    assert [d.num_predicted for d in row.dialogues] == [3, 2] and row.length == 9 and not truncated
    assert Dialogue([12, EOS], 0).num_predicted == 1  # no position predicts the first token
    assert row.pairs == [(0, 1, 1.0, True)]
    assert row.sides(is_paired=True) == row.sides(is_paired=False) == [(1.0, 0.0), (0.0, 1.0)]


def test_pair_weights_of_a_ranking_sum_to_one_and_a_tie_counts_half_each_way():
    row, _ = tokenize_paired(RANKING, **FIT)
    assert row.ranks == [1.0, 1.0, 2.0, 3.0]
    assert [pair[:2] for pair in row.pairs if not pair.is_label] == [(0, 1), (1, 0)]
    weights = {(p.better, p.worse): p.weight for p in row.pairs}
    half, full = 1 / 12, 1 / 6
    assert weights == pytest.approx(
        {(0, 1): half, (1, 0): half} | dict.fromkeys([(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], full)
    )
    chosen, rejected = zip(*row.sides(is_paired=True), strict=True)
    assert chosen == pytest.approx([5 / 12, 5 / 12, 1 / 6, 0])
    assert rejected == pytest.approx([1 / 12, 1 / 12, 1 / 3, 1 / 2])


SOFT = {"prompt": "a b", "response_a": "c", "response_b": "d e", "preference": 0.25}


def test_a_soft_label_weighs_both_orders_by_its_probability():
    row, _ = tokenize_paired(normalise_record(SOFT), **FIT)
    assert [d.num_predicted for d in row.dialogues] == [3, 2]  # B first
    assert row.pairs == [(0, 1, 0.75, True), (1, 0, 0.25, False)]
    assert row.sides(is_paired=True) == [(0.75, 0.25), (0.25, 0.75)]
    assert tokenize_unpaired(normalise_record(SOFT), **FIT)[0].sides(is_paired=False) == row.sides(
        is_paired=True
    )
    tie, _ = tokenize_paired(normalise_record(SOFT | {"preference": 0.5}), **FIT)
    assert tie.pairs == [(0, 1, 0.5, False), (1, 0, 0.5, False)]


def test_only_the_last_turn_is_the_response():
    """Earlier turns that differ are context."""
    turns = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    end = [{"role": "assistant", "content": "d e"}]
    other = [*turns[:1], {"role": "assistant", "content": "f"}, turns[2]]
    row, _ = tokenize_paired({"chosen": turns + end, "rejected": other + end}, **FIT)
    assert [d.num_predicted for d in row.dialogues] == [3, 3]


def test_a_response_truncated_here_has_no_eos():
    fit = FIT | {"max_length": 5, "overlong": "truncate_response"}
    row, truncated = tokenize_paired({"prompt": "a b", "chosen": "c d e f", "rejected": "g"}, **fit)
    assert truncated and row.dialogues[0] == Dialogue([10, 11, 12, 13, 14], 2)


@pytest.mark.parametrize("convert", [tokenize_paired, tokenize_unpaired])
def test_a_response_marked_as_truncated_has_no_eos(convert):
    """Strings and messages, chosen and rejected; also `ended` of a single response."""
    messages = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "c"), ("rejected", "d"))
    }
    for pair in (
        {"prompt": "a b", "chosen": "c", "rejected": "d"},
        {"prompt": [{"role": "user", "content": "a"}], **messages},
    ):
        for ended in ((True, True), (False, True), (True, False)):
            record = pair | dict(zip(("chosen_ended", "rejected_ended"), ended, strict=True))
            row, _ = convert(record, **FIT)
            assert tuple(d.ids[-1] == EOS for d in row.dialogues) == ended
            assert tuple(d.num_predicted == 2 for d in row.dialogues) == ended
    row, _ = tokenize_unpaired({"prompt": "a", "completion": "b", "label": True, "ended": False}, **FIT)
    assert row.dialogues[0].ids[-1] != EOS


@pytest.mark.parametrize("label", [True, False])
def test_a_label_makes_a_response_chosen_or_rejected(label):
    row, _ = tokenize_unpaired({"prompt": "a b", "completion": "c", "label": label}, **FIT)
    assert row.dialogues == [Dialogue([10, 11, 12, EOS], 2)] and row.pairs == []
    assert row.sides(is_paired=False) == [(1.0, 0.0) if label else (0.0, 1.0)]


def test_a_preference_is_split_into_its_best_and_its_worst():
    row, _ = tokenize_unpaired(RANKING, **FIT)
    assert isinstance(row, Choice) and row.ranks == [0.0, 0.0, 1.0]
    with pytest.raises(Dropped, match="ties"):
        tokenize_unpaired({"prompt": "a", "chosen": "b", "rejected": "c", "tie": True}, **FIT)


@pytest.mark.parametrize(
    ("convert", "record", "message"),
    [
        (tokenize_paired, {"prompt": "a", "completion": "b", "label": True}, "which --loss kto takes"),
        (tokenize_paired, {"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        (
            tokenize_paired,
            {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_ended": 0},
            "'chosen_ended' is 0",
        ),
        (tokenize_unpaired, {"prompt": "a", "completion": "b"}, "'label' is missing"),
        (
            tokenize_unpaired,
            {"prompt": "a", "completion": "b", "label": 1},
            "'label' is 1; it must be true or false",
        ),
        (tokenize_unpaired, {"prompt": "a", "label": True}, "'completion' is missing"),
        (tokenize_unpaired, {"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    ],
)
def test_unusable_records_are_refused(convert, record, message):
    with pytest.raises(ValueError, match=message):
        convert(record, **FIT)


def test_labels_and_flags_may_be_strings_as_in_csv():
    single = {"prompt": "a b", "completion": "c"}
    for text, label in (("true", True), ("False", False)):
        assert tokenize_unpaired(single | {"label": text}, **FIT) == tokenize_unpaired(
            single | {"label": label}, **FIT
        )
    with pytest.raises(ValueError, match="field 'label' is 'yes'; it must be true or false"):
        tokenize_unpaired(single | {"label": "yes"}, **FIT)
    pair = {"prompt": "a b", "chosen": "c", "rejected": "d"}
    assert tokenize_paired(pair | {"rejected_ended": "false"}, **FIT) == tokenize_paired(
        pair | {"rejected_ended": False}, **FIT
    )

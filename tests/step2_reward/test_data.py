"""Tokenised preferences, and their layout in a batch."""

import json
from functools import partial
from pathlib import Path

import pytest

from common.data.loading import load_examples
from common.runtime.options import UserError
from common.text.record_formats import normalise_record
from step2_reward.data import Layout, Preference, check_margins, collate, tokenize_preference
from step2_reward.options import RewardOptions
from tests.conftest import assert_close
from tests.word_encoder import EOS, PAD, WordEncoder

PAIR = {"prompt": "a b", "chosen": "c", "rejected": "d e"}
SOFT = {"prompt": "a b", "response_a": "c", "response_b": "d e", "preference": 0.3}
RANKING = {"prompt": "a b", "responses": ["c", "d e", "f g h"], "ranks": [2, 0.5, 2]}


def convert(record: dict, max_length: int = 64, use_margin: bool = False) -> Preference:
    return tokenize_preference(record, WordEncoder(), max_length, "truncate_prompt", use_margin)[0]


def test_a_pair_is_a_ranking_of_two():
    row = convert(PAIR)
    assert row == ([10, 11], [12, EOS, 12, 13, EOS], [2, 3], [0.0, 1.0], 0.0, 1.0, True, [])
    assert (row.length, row.pairs, row.chosen_ids) == (7, [(0, 1)], [10, 11, 12, EOS])
    assert convert({"prompt": "a b", "responses": ["d e", "c"], "ranks": [1, 0]}) == row
    assert convert(PAIR | {"tie": True}).ranks == [0.0, 0.0]


def test_responses_are_sorted_by_rank():
    row = convert(RANKING)
    assert row.responses == [[12, 13, EOS], [12, EOS], [12, 13, 14, EOS]]
    assert row.ranks == [0.5, 2.0, 2.0] and row.pairs == [(0, 1), (0, 2), (1, 2)]


def test_the_common_prefix_of_dialogues_is_the_prompt():
    """An earlier turn that differs belongs to the response. (WordEncoder numbers words by position.)"""
    last_turns = [{"role": "user", "content": "z"}, {"role": "assistant", "content": "y"}]
    early = [{"role": "assistant", "content": text} for text in ("b", "b c")]
    record = {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [early[0], *last_turns],
        "rejected": [early[1], *last_turns],
    }
    row = convert(record)
    assert row.prompt_ids == [10, 11, 12, 13, 14, 15]  # user : a assistant : b
    assert row.responses == [[EOS, *range(17, 23), EOS], [16, EOS, *range(18, 24), EOS]]


def test_margin_is_used_only_with_use_margin():
    record = PAIR | {"margin": 1.5}
    assert convert(record).margin == 0.0
    assert convert(record, use_margin=True).margin == 1.5
    for bad, message in (
        (PAIR | {"margin": "much"}, "'margin' is 'much'"),
        (PAIR | {"margin": -1}, "'margin' is -1; it must be from 0 to 1e"),
        (PAIR | {"margin": 1e7}, "'margin' is 1e"),
        (RANKING | {"margin": 1}, "pair"),
    ):
        convert(bad)
        with pytest.raises(ValueError, match=message):
            convert(bad, use_margin=True)


def test_all_responses_have_the_same_truncated_prompt():
    row = convert({"prompt": "a b c d e", "responses": ["x", "x y z"], "ranks": [1, 2]}, max_length=6)
    assert row.prompt_ids == [13, 14] and row.responses == [[15, EOS], [15, 16, 17, EOS]]


ROWS = [Preference([2, 3], [4, EOS, 5, 6, EOS], [2, 3], [0.0, 1.0], 0.5), convert(RANKING)]


def test_without_shared_prompts_each_response_has_a_row():
    batch = collate(ROWS, Layout(PAD))
    assert batch.input_ids.tolist() == [
        [2, 3, 4, EOS, PAD, PAD],
        [2, 3, 5, 6, EOS, PAD],
        [10, 11, 12, 13, EOS, PAD],
        [10, 11, 12, EOS, PAD, PAD],
        [10, 11, 12, 13, 14, EOS],
    ]
    assert batch.segments.tolist() == [[0, 0] + [1] * n + [-1] * (4 - n) for n in (2, 3, 3, 2, 4)]


def test_positions_continue_from_a_shared_prompt():
    batch = collate(ROWS, Layout(PAD, share_prompts=True))
    assert batch.input_ids.tolist() == [
        [2, 3, 4, EOS, 5, 6, EOS, PAD, PAD, PAD, PAD],
        [10, 11, 12, 13, EOS, 12, EOS, 12, 13, 14, EOS],
    ]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 2, 3, 4, 0, 0, 0, 0],
        [0, 1, 2, 3, 4, 2, 3, 2, 3, 4, 5],
    ]
    assert batch.segments.tolist() == [
        [0, 0, 1, 1, 2, 2, 2, -1, -1, -1, -1],
        [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3],
    ]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_pairs_of_a_batch(share_prompts):
    batch = collate(ROWS, Layout(PAD, share_prompts))
    assert batch.better.tolist() == [0, 2, 2, 3] and batch.worse.tolist() == [1, 3, 4, 4]
    assert batch.is_tie.tolist() == [False, False, False, True]
    assert_close(batch.margins.tolist(), [0.5, 0.0, 0.0, 0.0])
    assert_close(batch.weights.tolist(), [1.0, 1 / 3, 1 / 3, 1 / 3])
    assert_close(batch.targets.tolist(), [1.0, 1.0, 1.0, 0.5])
    tied = collate([ROWS[0]._replace(ranks=[0.0, 0.0])], Layout(PAD, share_prompts))
    soft = collate([convert(normalise_record(SOFT)), ROWS[0]], Layout(PAD, share_prompts))
    assert_close(soft.targets.tolist(), [0.7, 1.0])
    assert tied.is_tie.item() and tied.margins.item() == 0.0, "a tie has no margin"


@pytest.mark.parametrize("text", ["0.5", " 0.5", "5e-1"])
def test_numbers_flags_and_lists_may_be_strings_as_in_csv(text: str) -> None:
    assert convert(PAIR | {"margin": text}, use_margin=True) == convert(
        PAIR | {"margin": 0.5}, use_margin=True
    )
    assert convert(PAIR | {"tie": "False"}) == convert(PAIR)
    assert convert(PAIR | {"tie": "true"}).ranks == [0.0, 0.0]
    assert convert(PAIR | {"chosen_ended": "false"}) == convert(PAIR | {"chosen_ended": False})
    assert convert(normalise_record(SOFT | {"preference": "0.3"})) == convert(normalise_record(SOFT))
    lists = {name: json.dumps(RANKING[name]) for name in ("responses", "ranks")}
    assert convert(normalise_record(RANKING | lists)) == convert(RANKING)


def load(folder: Path, name: str, margins: list[float | None], options: RewardOptions) -> tuple:
    """Write and load training data with these margins."""
    path = folder / f"{name}.jsonl"
    records = [
        PAIR | {"prompt": f"{n}"} | ({} if m is None else {"margin": m}) for n, m in enumerate(margins)
    ]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    options.train_data = [str(path)]
    convert = partial(
        tokenize_preference,
        encoder=WordEncoder(),
        max_length=64,
        overlong="drop",
        use_margin=options.use_margin,
    )
    return load_examples(options.train_data, options, Preference, convert)


def test_missing_margins_are_an_error_or_a_warning(tmp_path, capsys):
    options = RewardOptions(use_margin=True, eval_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    train, _ = load(tmp_path, "none", [None] * 3, options)
    with pytest.raises(
        UserError, match="--use_margin: no record of .*none.jsonl has a 'margin' other than 0"
    ):
        check_margins(options, train, [])
    some, _ = load(tmp_path, "some", [None, 0.5, 2], options)
    capsys.readouterr()
    check_margins(options, some, list(train))
    assert capsys.readouterr().out.splitlines() == [
        "warning: --use_margin: 1 of 3 training records have no 'margin', or 0",
        "warning: --use_margin: 3 of 3 held-out records have no 'margin', or 0",
    ]
    check_margins(options, load(tmp_path, "all", [1, 0.5, 2], options)[0], [])
    assert "margin" not in capsys.readouterr().out
    off = RewardOptions(eval_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    check_margins(off, load(tmp_path, "off", [None], off)[0], [])

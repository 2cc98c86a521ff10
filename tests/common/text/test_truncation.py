"""Length policies: what is truncated or dropped."""

import pytest

from common.text.prompts import tokenize_prompt
from common.text.segments import prompt_segments
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.text.truncation import Dropped, fit, fit_demonstration
from step1_sft.data import tokenize_demonstration
from step2_reward.data import tokenize_preference

SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": role, "content": f"{role} says {word}"}
    for word in ("one", "two", "three")
    for role in ("user", "assistant")
]


@pytest.fixture(scope="module")
def encoder(shared) -> SegmentEncoder:
    """A tokenizer that adds BOS, with a few letters per token."""
    return SegmentEncoder(load_tokenizer(str(shared / "models/stories260K")))


def length(record: dict, encoder: SegmentEncoder) -> int:
    return len(fit_demonstration(record, encoder, 10_000, "error")[0].ids)


@pytest.mark.parametrize("system", [[], [SYSTEM]])
@pytest.mark.parametrize("questions", [1, 2])
def test_oldest_user_turns_are_removed_first(encoder, system, questions):
    shorter = {"messages": system + TURNS[-2 * questions :]}
    room = length(shorter, encoder)
    for spare in (0, 1):
        row, is_cut = fit_demonstration(
            {"messages": system + TURNS}, encoder, room + spare, "truncate_prompt"
        )
        assert is_cut
        assert row == fit_demonstration(shorter, encoder, 10_000, "error")[0]


def test_then_tokens_are_removed_from_the_left_after_bos(encoder):
    """Down to one prompt token; a shorter limit drops the record."""
    record = {"prompt": "Once upon a time there was a dog.", "completion": " It ran."}
    full, is_cut = fit_demonstration(record, encoder, 10_000, "truncate_prompt")
    assert not is_cut and full.ids[0] == encoder.tokenizer.bos_token_id
    response = full.ids[full.start :]
    for length in (5, 1):
        row, is_cut = fit_demonstration(record, encoder, 1 + length + len(response), "truncate_prompt")
        assert is_cut
        assert row.ids == [full.ids[0], *full.ids[full.start - length : full.start], *response]
    with pytest.raises(Dropped, match="response too long"):
        fit_demonstration(record, encoder, 1 + len(response), "truncate_prompt")


def test_truncated_response_keeps_eos_for_scoring(encoder):
    record = {"prompt": "Once upon a time", "completion": " there was a dog that ran and ran."}
    full, _ = fit_demonstration(record, encoder, 10_000, "truncate_response")
    for limit in (full.start + 2, full.start + 4):
        plain, scored = (
            fit_demonstration(record, encoder, limit, "truncate_response", keep_end)[0].ids
            for keep_end in (False, True)
        )
        assert plain == full.ids[:limit]
        assert scored == [*full.ids[: limit - 1], encoder.eos_token_id]
    for limit in (full.start - 3, full.start):
        with pytest.raises(Dropped, match="prompt too long"):
            fit_demonstration(record, encoder, limit, "truncate_response")


def test_drop_and_error(encoder):
    record = {"prompt": "Once upon a time", "completion": " there was a dog."}
    size = length(record, encoder)
    for policy in ("drop", "error"):
        assert fit_demonstration(record, encoder, size, policy)[1] is False
    with pytest.raises(Dropped, match="too long"):
        fit_demonstration(record, encoder, size - 1, "drop")
    with pytest.raises(ValueError, match=f"has {size} tokens, more than {size - 1}"):
        fit_demonstration(record, encoder, size - 1, "error")


def test_responses_to_a_prompt_keep_the_same_part_of_it(encoder):
    """The longest response decides which messages, or which last tokens, are kept."""
    ranked = {"responses": ["yes", "no, not at all, never", "so"], "ranks": [1, 2, 3]}
    for start, rest in (("abcdefgh" * 3, None), (TURNS[:1], None), (TURNS[:3], TURNS[2:3])):
        full, _ = tokenize_preference({"prompt": start} | ranked, encoder, 10_000, "error", use_margin=False)
        limit = len(full.prompt_ids) + max(full.response_lengths) - 5
        row, is_cut = tokenize_preference(
            {"prompt": start} | ranked, encoder, limit, "truncate_prompt", use_margin=False
        )
        expected = [encoder.tokenizer.bos_token_id, *full.prompt_ids[6:]]
        if rest:
            expected = tokenize_preference(
                {"prompt": rest} | ranked, encoder, limit, "error", use_margin=False
            )[0].prompt_ids
        assert is_cut and row == full._replace(prompt_ids=expected)


def test_responses_identical_after_truncation_are_dropped(encoder):
    record = {"prompt": "a", "chosen": "b" * 40 + "c", "rejected": "b" * 40 + "d"}
    with pytest.raises(Dropped, match="identical after truncation"):
        tokenize_preference(record, encoder, 20, "truncate_response", use_margin=False)


def test_every_row_has_a_response(encoder):
    """With any limit and policy, a row has a response and fits the limit."""
    record = {"messages": [SYSTEM, *TURNS]}
    for policy in ("truncate_prompt", "truncate_response", "drop"):
        for limit in range(8, length(record, encoder) + 2):
            try:
                row, _ = tokenize_demonstration(record, encoder, limit, policy, loss_on="response")
            except Dropped:
                continue
            assert len(row.ids) <= limit and any(row.is_trained)


def test_a_prompt_is_cut_at_a_message_too(encoder):
    conversation = {"prompt": [SYSTEM, *TURNS[:5]]}
    shorter = prompt_segments([SYSTEM, *TURNS[2:5]], encoder.render, encoder.tokenizer.eos_token)
    ids, _ = encoder.encode(shorter)
    row, is_cut = tokenize_prompt(conversation, encoder, len(ids) + 3, "truncate_prompt")
    assert is_cut and row.ids == ids and row.record == conversation
    with pytest.raises(Dropped, match="prompt too long"):
        tokenize_prompt(conversation, encoder, len(ids), "truncate_response")


def test_prompt_and_response_have_the_same_ids_in_all_stages(encoder):
    for text in (
        {"prompt": "Once upon", "completion": " a time."},
        {"prompt": TURNS[:3], "completion": "hi"},
    ):
        learnt, _ = tokenize_demonstration(text, encoder, 512, "drop", loss_on="response")
        sides = {**text, "chosen": text["completion"], "rejected": "?"}
        if isinstance(text["prompt"], list):
            for side in ("chosen", "rejected"):
                sides[side] = [{"role": "assistant", "content": sides[side]}]
        compared, _ = tokenize_preference(sides, encoder, 512, "drop", use_margin=False)
        asked, _ = tokenize_prompt(text, encoder, 512, "drop")
        assert learnt.ids == compared.chosen_ids and learnt.prompt_ids == asked.ids


def test_prompt_longer_than_the_limit(encoder):
    (row,), _ = fit("a b c", lambda p: [prompt_segments(p, None, "</s>")], encoder, 3, "truncate_prompt")
    assert len(row.ids) == 3 and row.start == 3

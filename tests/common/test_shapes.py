"""Popular shapes of records become the documented ones, and near misses are named."""

import pytest

from common.formatting import comparison, demonstration_segments, find_prompt
from common.shapes import recognise
from tests.common.test_formatting import DEFAULT, EOS

ASK = {"role": "user", "content": "Hi?"}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_documented_shapes_stay_as_they_are():
    for record in (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1},
        {"messages": [ASK, reply("b")]},
        {"chosen": "a b", "rejected": "a c"},
    ):
        assert recognise(record) is record


def test_sharegpt():
    turns = [("system", "Be kind."), ("human", "Hi?"), ("gpt", "Hello."), ("human", "Bye."), ("gpt", "Bye!")]
    record = {"conversations": [{"from": name, "value": value} for name, value in turns]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    expected = [{"role": role, "content": value} for role, (_, value) in zip(roles, turns, strict=True)]
    assert recognise(record)["messages"] == expected


@pytest.mark.parametrize(
    ("given", "text"), [({}, "Sum."), ({"input": ""}, "Sum."), ({"input": "1 2"}, "Sum.\n\n1 2")]
)
def test_alpaca(given, text):
    record = recognise({"instruction": "Sum.", "output": "3", **given})
    assert record["prompt"] == [{"role": "user", "content": text}] and record["completion"] == "3"
    assert find_prompt(recognise({"instruction": "Sum.", **given})) == record["prompt"]
    as_messages = {"messages": [*record["prompt"], reply("3")]}
    found, expected = (demonstration_segments(r, DEFAULT, EOS) for r in (record, as_messages))
    assert found == expected


def test_whole_dialogues_of_human_and_assistant():
    begin = "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: A Human: or two\n\nlines\n\nAssistant:"
    record = recognise({"chosen": begin + " Good.", "rejected": begin + " Bad."})
    shared = [ASK, reply("Yes?"), {"role": "user", "content": "A Human: or two\n\nlines"}]
    assert record["chosen"] == [*shared, reply("Good.")]
    assert record["rejected"] == [*shared, reply("Bad.")]
    explicit = {"prompt": shared, "chosen": "Good.", "rejected": "Bad."}
    found, expected = comparison(record), comparison(explicit)
    assert found.prompt == expected.prompt
    assert found.responses == {name: [reply(text)] for name, text in expected.responses.items()}


@pytest.mark.parametrize(
    ("says", "chosen", "tie"),
    [
        ({"preference": "A"}, "x", False), ({"preference": "b"}, "y", False),
        ({"preference": "tie"}, "x", True), ({"votes": ["B", "B", "A"]}, "y", False),
        ({"votes": ["A", "B"]}, "x", True), ({"votes": ["A", "tie", "tie"]}, "x", True),
        ({"votes": ["a"], "preference": "B"}, "x", False),
        ({"preference": 0.5}, "x", True), ({"preference": 0.2}, "y", False), ({"preference": 1}, "x", False),
    ],
)  # fmt: skip
def test_comparisons_and_votes(says, chosen, tie):
    record = recognise({"prompt": "p", "response_a": "x", "response_b": "y", **says})
    assert (record["chosen"], record["tie"]) == (chosen, tie)
    assert {record["chosen"], record["rejected"]} == {"x", "y"}
    assert record["chosen_probability"] == (0.8 if says == {"preference": 0.2} else 0.5 if tie else 1.0)


@pytest.mark.parametrize(
    ("flags", "preference", "expected"),
    [
        ({"response_a_ended": False}, "A", {"chosen_ended": False}),
        ({"response_a_ended": False, "response_b_ended": True}, "B",
         {"chosen_ended": True, "rejected_ended": False}),
        ({"response_b_ended": False}, "tie", {"rejected_ended": False}),
        ({"response_a_ended": True, "chosen_ended": False}, "A", {"chosen_ended": True}),
        ({}, "A", {}),
    ],
)  # fmt: skip
def test_a_cut_response_stays_marked_on_its_side(flags, preference, expected):
    record = recognise(
        {"prompt": "p", "response_a": "x", "response_b": "y", "preference": preference} | flags
    )
    assert {name: record[name] for name in ("chosen_ended", "rejected_ended") if name in record} == expected


def test_a_field_of_ours_in_a_record_is_not_taken_for_it():
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    assert recognise({**pair, "chosen_probability": "high"}) == pair
    sides = {"prompt": "p", "response_a": "x", "response_b": "y", "preference": 0.8}
    assert recognise({**sides, "chosen_probability": 7})["chosen_probability"] == 0.8


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": "Hi"}, "'conversations' is str"),
        ({"conversations": [{"role": "user"}]}, "turn 0 must have 'from' and 'value'"),
        ({"conversations": [{"from": "cat", "value": "miaow"}]}, "from 'cat'; allowed: human"),
        ({"instruction": ["Sum."], "output": "3"}, "'instruction' and 'input' must be strings"),
        ({"prompt": "p", "response_a": "x", "preference": "A"}, "'response_b' is missing"),
        ({"prompt": "p", "response_a": "x", "response_b": "y"}, "preference is None; allowed: A B tie"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "votes": []}, "'votes' must be a list"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "votes": ["C"]}, "preference is 'C'"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "votes": [0.7]}, "preference is 0.7; allowed"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "preference": 7}, "preference is 7; a number"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "preference": True}, "preference is True"),
    ],
)
def test_a_near_miss_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        recognise(record)

"""Conversion of popular record formats, and errors for invalid records."""

import json

import pytest

from common.text.record_formats import agreement, normalise_record
from common.text.segments import demonstration_segments, find_prompt, parse_comparison
from tests.common.text.test_segments import DEFAULT, EOS

ASK = {"role": "user", "content": "Hi?"}


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def reply(text: str) -> dict[str, str]:
    return message("assistant", text)


def test_documented_formats_are_unchanged():
    for record in (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1},
        {"messages": [ASK, reply("b")]},
        {"chosen": "a b", "rejected": "a c"},
    ):
        assert normalise_record(record) is record


def test_scored_responses():
    """With a score, `response` is a completion; without one, or beside a completion, it stays as it is."""
    record = {"prompt": "a", "response": "b", "score": 0.5}
    assert normalise_record(record) == {**record, "completion": "b"}
    messages = [{"from": "human", "value": "a"}]
    turns = {"prompt": messages, "response": [{"from": "gpt", "value": "b"}], "score": 1}
    assert normalise_record(turns)["completion"] == [reply("b")]
    for unchanged in ({"prompt": "a", "response": "b"}, {**record, "completion": "c"}):
        assert normalise_record(unchanged) is unchanged


def test_sharegpt():
    turns = [("system", "Be kind."), ("human", "Hi?"), ("gpt", "Hello."), ("human", "Bye."), ("gpt", "Bye!")]
    record = {"conversations": [{"from": name, "value": value} for name, value in turns]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    expected = [{"role": role, "content": value} for role, (_, value) in zip(roles, turns, strict=True)]
    assert normalise_record(record)["messages"] == expected


@pytest.mark.parametrize(
    ("given", "text"), [({}, "Sum."), ({"input": ""}, "Sum."), ({"input": "1 2"}, "Sum.\n\n1 2")]
)
def test_alpaca(given, text):
    record = normalise_record({"instruction": "Sum.", "output": "3", **given})
    assert record["prompt"] == [{"role": "user", "content": text}] and record["completion"] == "3"
    assert find_prompt(normalise_record({"instruction": "Sum.", **given})) == record["prompt"]
    as_messages = {"messages": [*record["prompt"], reply("3")]}
    segments, expected = (demonstration_segments(r, DEFAULT, EOS) for r in (record, as_messages))
    assert segments == expected


def test_whole_dialogues_of_human_and_assistant():
    begin = "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: A Human: or two\n\nlines\n\nAssistant:"
    record = normalise_record({"chosen": begin + " Good.", "rejected": begin + " Bad."})
    shared = [ASK, reply("Yes?"), {"role": "user", "content": "A Human: or two\n\nlines"}]
    assert record["chosen"] == [*shared, reply("Good.")]
    assert record["rejected"] == [*shared, reply("Bad.")]
    explicit = {"prompt": shared, "chosen": "Good.", "rejected": "Bad."}
    result, expected = parse_comparison(record), parse_comparison(explicit)
    assert result.prompt == expected.prompt
    assert result.responses == {name: [reply(text)] for name, text in expected.responses.items()}


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
    record = normalise_record({"prompt": "p", "response_a": "x", "response_b": "y", **says})
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
def test_truncated_response_keeps_its_flag(flags, preference, expected):
    record = normalise_record(
        {"prompt": "p", "response_a": "x", "response_b": "y", "preference": preference} | flags
    )
    assert {name: record[name] for name in ("chosen_ended", "rejected_ended") if name in record} == expected


def test_chosen_probability_of_a_record_is_ignored():
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    assert normalise_record({**pair, "chosen_probability": "high"}) == pair
    sides = {"prompt": "p", "response_a": "x", "response_b": "y", "preference": 0.8}
    assert normalise_record({**sides, "chosen_probability": 7})["chosen_probability"] == 0.8


def test_alpaca_with_history_and_system_is_a_dialogue():
    """Its earlier replies are trained on, as in any dialogue."""
    given = {
        "instruction": "And 3?",
        "input": "",
        "output": "4",
        "history": [["And 1?", "2"], ["And 2?", "3"]],
    }
    turns = [
        message("user", "And 1?"),
        reply("2"),
        message("user", "And 2?"),
        reply("3"),
        message("user", "And 3?"),
    ]
    assert normalise_record(given)["messages"] == [*turns, reply("4")]
    record = normalise_record({**given, "system": "Add one."})
    assert record["messages"] == [message("system", "Add one."), *turns, reply("4")]
    assert find_prompt(record) == record["messages"][:-1]
    pair = {"instruction": "And 3?", "history": [["And 1?", "2"]], "chosen": "4", "rejected": "5"}
    compared = parse_comparison(normalise_record({**pair, "system": "Add one."}))
    assert compared.prompt == [message("system", "Add one."), *turns[:2], turns[-1]]
    assert compared.responses == {"chosen": "4", "rejected": "5"}
    for nothing in ({}, {"history": []}, {"history": "[]"}, {"system": ""}, {"system": " "}):
        assert "messages" not in normalise_record({"instruction": "And 3?", "output": "4", **nothing})


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_text_becomes_the_first_message(name):
    system, given = message("system", "Be kind."), {name: "Be kind."}
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "b"}]
    assert normalise_record({"conversations": turns, **given})["messages"] == [system, ASK, reply("b")]
    assert normalise_record({"messages": [ASK, reply("b")], **given})["messages"] == [system, ASK, reply("b")]
    assert normalise_record({"prompt": [ASK], "completion": "b", **given})["prompt"] == [system, ASK]
    sides = normalise_record({"chosen": [ASK, reply("b")], "rejected": [ASK, reply("c")], **given})
    assert [sides["chosen"], sides["rejected"]] == [[system, ASK, reply("b")], [system, ASK, reply("c")]]
    hh = normalise_record(
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: b", "rejected": "\n\nHuman: Hi?\n\nAssistant: c", **given}
    )
    assert hh["chosen"] == [system, ASK, reply("b")]
    asked = normalise_record(
        {"prompt": "Hi?", "chosen": [ASK, reply("b")], "rejected": [ASK, reply("c")], **given}
    )
    assert parse_comparison(asked).prompt == [system, ASK] == find_prompt(asked)
    arena = normalise_record(
        {"prompt": [ASK], "response_a": "x", "response_b": "y", "preference": "A", **given}
    )
    assert arena["prompt"] == [system, ASK]
    again = normalise_record({"messages": [system, ASK, reply("b")], **given})
    assert again["messages"] == [system, ASK, reply("b")] == normalise_record(again)["messages"]


@pytest.mark.parametrize("begin", [[], [message("system", "Be kind.")]])
def test_system_text_is_inserted_in_dialogues_that_repeat_the_prompt(begin):
    """The prompt appears once, whether or not the dialogues have the system message."""
    prompt = [message("system", "Be kind."), ASK]
    b, c = ([*begin, ASK, reply(text)] for text in "bc")
    for asked in ([ASK], prompt):
        given = {"system": "Be kind.", "prompt": asked}
        pair = normalise_record({**given, "chosen": b, "rejected": c})
        arena = normalise_record({**given, "response_a": b, "response_b": c, "preference": "A"})
        for record in (pair, arena):
            assert find_prompt(record) == parse_comparison(record).prompt == prompt
            assert parse_comparison(record).responses == {"chosen": [reply("b")], "rejected": [reply("c")]}
        ranking = parse_comparison(normalise_record({**given, "responses": [b, c], "ranks": [1, 2]}))
        assert ranking.prompt == prompt
        assert [*ranking.responses.values()] == [[reply("b")], [reply("c")]]
        one = normalise_record({**given, "completion": b})
        expected = demonstration_segments({"messages": [*prompt, reply("b")]}, DEFAULT, EOS)
        assert demonstration_segments(one, DEFAULT, EOS) == expected
    one = normalise_record({"system": "Be kind.", "prompt": "Hi?", "completion": b})
    assert demonstration_segments(one, DEFAULT, EOS) == expected
    with pytest.raises(ValueError, match="differs from the system message"):
        normalise_record({"system": "Be brief.", "prompt": [ASK], "completion": [*prompt, reply("b")]})


def test_system_text_with_a_string_prompt_and_replies():
    sides = {"chosen": [reply("b")], "rejected": [reply("c")]}
    record = normalise_record({"system": "Be kind.", "prompt": "Hi?", **sides})
    assert parse_comparison(record).prompt == find_prompt(record) == [message("system", "Be kind."), ASK]
    assert parse_comparison(record).responses == sides


def test_last_replies_are_not_part_of_a_prompt():
    sides = {"chosen": [reply("b")], "rejected": [reply("c")]}
    record = normalise_record({"messages": [ASK, reply("a")], **sides})
    assert parse_comparison(record).prompt == find_prompt(record) == [ASK]
    assert parse_comparison(record).responses == sides


def test_orca():
    """With pairs or with one response."""
    sides = {"chosen": "The sky is blue", "rejected": "The sky is red"}
    for system, begin in (("", []), ("Be kind.", [message("system", "Be kind.")])):
        compared = parse_comparison(normalise_record({"system": system, "question": "Hi?", **sides}))
        assert (compared.prompt, compared.responses) == ([*begin, ASK], sides)
        for name in ("response", "answer", "output"):
            record = normalise_record({"system_prompt": system, "question": "Hi?", name: "b"})
            assert (record["prompt"], record["completion"]) == ([*begin, ASK], "b")
    dialogues = {"chosen": [ASK, reply("b")], "rejected": [ASK, reply("c")]}
    assert parse_comparison(normalise_record({"question": "a note", **dialogues})).prompt == [ASK]
    asked = normalise_record({"instruction": "Hi?", **dialogues})
    assert parse_comparison(asked).prompt == find_prompt(asked) == [ASK]
    assert normalise_record({"prompt": "Hi?", "question": "a note"})["prompt"] == "Hi?"


def test_dolly():
    record = normalise_record({"instruction": "Sum.", "context": "1 2", "response": "3", "category": "maths"})
    assert record["prompt"] == [message("user", "Sum.\n\n1 2")] and record["completion"] == "3"
    for more in ({"context": ""}, {"input": "", "context": " "}):
        assert normalise_record({"instruction": "Hi?", "response": "b", **more})["prompt"] == [ASK]


def test_sharegpt_with_two_responses():
    turns = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi?"}]
    prompt = [message("system", "Be kind."), ASK]
    for wrap in (
        lambda text: {"from": "gpt", "value": text},
        lambda text: [{"from": "gpt", "value": text}],
        reply,
    ):
        record = normalise_record({"conversations": turns, "chosen": wrap("b"), "rejected": wrap("c")})
        compared = parse_comparison(record)
        assert compared.prompt == prompt == find_prompt(record)
        assert compared.responses == {"chosen": [reply("b")], "rejected": [reply("c")]}
    dialogues = {"chosen": [ASK, reply("b")], "rejected": [ASK, reply("c")], "messages": [ASK, reply("b")]}
    assert "prompt" not in normalise_record(dialogues)  # the responses are dialogues that include it


def test_messages_in_conversations_and_turns_in_messages():
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "b", "weight": 0}]
    assert normalise_record({"messages": turns})["messages"] == [ASK, {**reply("b"), "weight": 0}]
    assert normalise_record({"conversations": [ASK, reply("b")]})["messages"] == [ASK, reply("b")]


def test_kto_tags_are_labels():
    assert normalise_record({"instruction": "Hi?", "output": "b", "kto_tag": True})["label"] is True
    assert normalise_record({"prompt": "Hi?", "completion": "b", "kto_tag": "false"})["label"] == "false"


def test_lists_may_be_json_text_as_in_csv():
    messages = [ASK, reply("b")]
    assert normalise_record({"messages": json.dumps(messages)})["messages"] == messages
    pair = {"prompt": "p", "response_a": "x", "response_b": "y", "votes": '["A", "A", "tie"]'}
    assert (normalise_record(pair)["chosen"], agreement(normalise_record(pair))) == ("x", 2 / 3)
    assert normalise_record({"prompt": "[1, 2]"}) == {"prompt": "[1, 2]"}  # text is text
    assert normalise_record({"messages": "[broken"}) == {"messages": "[broken"}


@pytest.mark.parametrize(("text", "sure"), [("0.8", 0.8), ("1", 1.0), ("a", 1.0), ("0.5", 0.5)])
def test_a_preference_may_be_the_text_of_a_probability(text, sure):
    record = normalise_record({"prompt": "p", "response_a": "x", "response_b": "y", "preference": text})
    assert (record["chosen"], record["chosen_probability"]) == ("x", sure)


@pytest.mark.parametrize(
    "name", ["tools", "functions", "documents", "chat_template_kwargs", "images", "videos", "audios"]
)
def test_unsupported_field_is_refused_by_name(name):
    for record in ({"messages": [ASK, reply("b")]}, {"prompt": "a", "completion": "b"}, {"instruction": "a"}):
        for value in ([{"name": "look_up"}], {"enable_thinking": False}, "[{}]"):
            with pytest.raises(ValueError, match=f"field '{name}' changes the input of the model"):
                normalise_record({**record, name: value})
        for value in (None, "", [], {}, "[]", "null", [None], {"a": None}):
            assert normalise_record({**record, name: value})[name] == value


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": "Hi"}, "'conversations' is str"),
        ({"conversations": [{"role": "user"}]}, "turn 0 must have 'from' and 'value'"),
        ({"conversations": [{"from": ["a"], "value": "b"}]}, "turn 0 is from .'a'.; allowed: human"),
        ({"conversations": [{"from": "cat", "value": "miaow"}]}, "from 'cat'; allowed: human"),
        ({"instruction": ["Sum."], "output": "3"}, "'instruction' and 'input' must be strings"),
        ({"instruction": "a", "context": 3, "response": "b"}, "'instruction' and 'context' must be strings"),
        ({"instruction": "a", "input": "b", "context": "c"}, "'input' and 'context' have the same meaning"),
        (
            {"instruction": "a", "question": "b", "output": "c"},
            "'instruction' and 'question' have the same meaning",
        ),
        ({"question": " ", "response": "b"}, "'question' and 'input' are empty"),
        ({"prompt": "a", "completion": "b", "input": "c"}, "'input' needs 'instruction'"),
        ({"prompt": "a", "completion": "b", "context": "c"}, "'context' needs 'instruction'"),
        ({"input": "a", "chosen": "The b", "rejected": "The c"}, "'input' needs 'instruction'"),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, "'history' needs 'instruction'"),
        ({"messages": [ASK, reply("b")], "history": [["c", "d"]]}, "'history' needs 'instruction'"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' must be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c", 1]]}, "'history' must be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": "c"}, "'history' must be a list of pairs"),
        (
            {"prompt": "a", "completion": "b", "system": "c"},
            "'system' cannot be used with a prompt that is a",
        ),
        ({"chosen": "a b", "rejected": "a c", "system": "d"}, "'system' cannot be used"),
        ({"prompt": [ASK], "completion": "b", "system": ["c"]}, "'system' is list; it must be a string"),
        ({"messages": [message("system", "a"), ASK], "system": "b"}, "differs from the system message"),
        ({"conversations": [{"from": "observation", "value": "a"}]}, "turn 0 is from 'observation'; allowed"),
        (
            {"prompt": [ASK], "chosen": {"from": "gpt"}, "rejected": "b"},
            "'chosen': turn 0 must have 'from' and",
        ),
        ({"prompt": "p", "response_a": "x", "preference": "A"}, "'response_b' is missing"),
        ({"prompt": "p", "response_a": "x", "response_b": "y"}, "preference is None; allowed: A B tie"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "votes": []}, "'votes' must be a list"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "votes": ["C"]}, "preference is 'C'"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "votes": [0.7]}, "preference is 0.7; allowed"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "preference": 7}, "preference is 7; a number"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "preference": True}, "preference is True"),
    ],
)
def test_invalid_record_of_a_known_format_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        normalise_record(record)

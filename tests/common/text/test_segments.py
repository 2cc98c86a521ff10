"""Conversion of records to segments: exact text, response mask, errors that name the field."""

from collections.abc import Callable

import pytest
from jinja2 import Environment

from common.text.conversation import DEFAULT_CHAT_TEMPLATE, Segment
from common.text.segments import (
    demonstration_segments,
    dialogue_segments,
    find_prompt,
    parse_comparison,
    preference_segments,
    prompt_segments,
)

EOS = "<|end|>"
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NO_EOS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
COUNTING = "{{ messages | length }}" + NO_EOS  # the start of the text depends on later messages
FORGETS_REPLIES = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LOSES_CONTEXT = "{% if add_generation_prompt %}answer now:{% else %}" + NO_EOS + "{% endif %}"


def template(text: str) -> Callable:
    compiled = Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    return lambda messages, add_generation_prompt: compiled.render(
        messages=messages, add_generation_prompt=add_generation_prompt, eos_token=EOS
    )


DEFAULT = template(DEFAULT_CHAT_TEMPLATE)


def chat(*contents: str, system: str = "") -> list[dict]:
    """Alternating messages of user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}] * bool(system) + turns


def compare(record: dict, render: Callable = DEFAULT, eos: str = EOS) -> list[list[Segment]]:
    return preference_segments(parse_comparison(record), render, eos)


def text_of(segments: list[Segment]) -> str:
    return "".join(s.text + EOS * s.ends for s in segments)


def test_strings_are_used_verbatim():
    record = {"prompt": "  Q: {{x}}\n\n", "completion": " A <b> \n"}
    assert demonstration_segments(record, DEFAULT, EOS) == [
        Segment("  Q: {{x}}\n\n"),
        Segment(" A <b> \n", is_response=True, ends=True),
    ]
    assert prompt_segments(record["prompt"], DEFAULT, EOS) == [Segment("  Q: {{x}}\n\n")]


@pytest.mark.parametrize("prompt", ["Q: x", chat("x")], ids=["string", "messages"])
def test_no_eos_after_a_truncated_completion(prompt):
    record = {"prompt": prompt, "completion": " A"}
    segments = demonstration_segments({**record, "ended": True}, DEFAULT, EOS)
    assert segments == demonstration_segments(record, DEFAULT, EOS)
    assert (
        text_of(segments) == text_of(demonstration_segments({**record, "ended": False}, DEFAULT, EOS)) + EOS
    )
    with pytest.raises(ValueError, match="field 'ended' is 'no'; it must be true or false"):
        demonstration_segments({**record, "ended": "no"}, DEFAULT, EOS)


def test_default_template_turn_by_turn():
    record = {"messages": chat("hi", "hello", "bye", "so long", system="Be kind.")}
    assert demonstration_segments(record, DEFAULT, EOS) == [
        Segment("Be kind.\n\nHuman: hi\n\nAssistant:"),
        Segment(" hello", is_response=True, ends=True),
        Segment("\n\nHuman: bye\n\nAssistant:"),
        Segment(" so long", is_response=True, ends=True),
    ]


def test_chatml_template_turn_by_turn():
    record = {"messages": chat("hi", "hello", "bye", "so long")}
    assert demonstration_segments(record, template(CHATML), EOS) == [
        Segment("<|start|>user\nhi<|end|>\n<|start|>assistant\n"),
        Segment("hello", is_response=True, ends=True),
        Segment("\n<|start|>user\nbye<|end|>\n<|start|>assistant\n"),
        Segment("so long", is_response=True, ends=True),
    ]


@pytest.mark.parametrize("text", [DEFAULT_CHAT_TEMPLATE, CHATML], ids=["default", "chatml"])
def test_joined_segments_are_the_rendered_conversation(text):
    render, messages = template(text), chat("one", "two", "three", "four", system="zero")
    segments = demonstration_segments({"messages": messages}, render, EOS)
    assert text_of(segments) == render(messages, False).rstrip("\n")


def test_eos_is_added_when_the_template_has_none():
    segments = demonstration_segments({"messages": chat("a", "b", "c", "d")}, template(NO_EOS), EOS)
    assert text_of(segments) == "[user]a[assistant]b[user]c[assistant]d" + EOS


def test_messages_after_the_last_reply_are_dropped():
    messages = chat("hi", "hello", "and then?")
    expected = demonstration_segments({"messages": messages[:2]}, DEFAULT, EOS)
    assert demonstration_segments({"messages": messages}, DEFAULT, EOS) == expected


def test_a_prompt_of_messages_ends_where_the_response_begins():
    messages = chat("hi", "hello", "bye")
    prompt = prompt_segments(messages, DEFAULT, EOS)
    segments = dialogue_segments(messages, "so long", DEFAULT, EOS)
    assert text_of(prompt) == f"\n\nHuman: hi\n\nAssistant: hello{EOS}\n\nHuman: bye\n\nAssistant:"
    assert text_of(segments) == text_of(prompt) + " so long" + EOS


def test_only_the_last_reply_of_a_dialogue_is_the_response():
    segments = dialogue_segments(chat("hi", "hello", "bye"), chat("?", "so long")[1:], DEFAULT, EOS)
    assert [s.is_response for s in segments] == [False, False, False, True]
    assert [s.ends for s in segments] == [False, True, False, True]


@pytest.mark.parametrize("text", [COUNTING, LOSES_CONTEXT])
def test_a_template_that_rewrites_the_beginning_is_refused(text):
    with pytest.raises(ValueError, match="chat template renders a conversation differently"):
        demonstration_segments({"messages": chat("a", "b")}, template(text), EOS)


def test_an_earlier_reply_that_the_template_changes_is_context():
    segments = demonstration_segments({"messages": chat(*"abcd")}, template(FORGETS_REPLIES), EOS)
    assert segments == [
        Segment("[user]a[assistant][user]c[assistant]"),
        Segment("d", is_response=True, ends=True),
    ]


@pytest.mark.parametrize("text", [COUNTING, FORGETS_REPLIES, LOSES_CONTEXT])
def test_every_template_renders_a_prompt(text):
    render, messages = template(text), chat(*"abc")
    assert text_of(prompt_segments(messages, render, EOS)) == render(messages, True)


def test_eos_after_the_conversation_is_not_part_of_an_earlier_reply():
    text = NO_EOS.replace("{% endfor %}", "{% if m['role'] == 'assistant' %}<|x|>{% endif %}{% endfor %}")
    text += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert demonstration_segments({"messages": chat(*"abcd")}, template(text), EOS) == [
        Segment("[user]a[assistant]"),
        Segment("b<|x|>", is_response=True),
        Segment("[user]c[assistant]"),
        Segment("d<|x|>", is_response=True, ends=True),
    ]


def test_common_beginning_is_the_prompt(reference):
    case = reference("data.extract_prompt.text")
    chosen, rejected = compare(vars(case.inputs))
    prompt = Segment(case.outputs.prompt)
    assert chosen == [prompt, Segment(case.outputs.chosen, is_response=True, ends=True)]
    assert rejected == [prompt, Segment(case.outputs.rejected, is_response=True, ends=True)]
    assert find_prompt(vars(case.inputs)) == case.outputs.prompt


def test_common_beginning_of_messages():
    record = {"chosen": chat("hi", "hello", "bye", "so long"), "rejected": chat("hi", "hello", "bye", "go")}
    assert find_prompt(record) == chat("hi", "hello", "bye")
    explicit = {"prompt": chat("hi", "hello", "bye"), "chosen": "so long", "rejected": "go"}
    assert compare(record) == compare(explicit)


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("Q\nA: Yes", "Q\nA: Yes and no", "Q\nA:"),
        ("Q\nA: Nothing", "Q\nA: Never", "Q\nA:"),
        ("Q\nA: 3.14", "Q\nA: 3.15", "Q\nA:"),
        ("Q\nA: so it is", "Q\nA: so it was", "Q\nA: so it"),
        ("Q\nA:\nfoo", "Q\nA:\nfab", "Q\nA:\n"),
        ("Q: A ", "Q: A and", "Q:"),
        ("问：来吗？答：是", "问：来吗？答：是的", "问：来吗？答："),
        ("问：来吗？答：是", "问：来吗？答：不", "问：来吗？答："),
    ],
)
def test_common_beginning_ends_between_words(chosen, rejected, prompt):
    compared = parse_comparison({"chosen": chosen, "rejected": rejected})
    assert compared.prompt == prompt == find_prompt({"chosen": rejected, "rejected": chosen})
    assert [*compared.responses.values()] == [chosen[len(prompt) :], rejected[len(prompt) :]]
    assert all(text.strip() for text in compared.responses.values())


def test_dialogues_that_differ_in_a_question_share_the_earlier_turns():
    """A prompt ends before a reply."""
    record = {"chosen": chat("hi", "hello", "bye", "ciao"), "rejected": chat("hi", "hello", "who?", "me")}
    compared = parse_comparison(record)
    assert compared.prompt == find_prompt(record) == chat("hi")
    assert compared.responses["chosen"] == chat("hi", "hello", "bye", "ciao")[1:]
    assert find_prompt({"prompt": chat("hi", "hello")}) == chat("hi")
    longer = {"chosen": chat("hi", "hello"), "rejected": chat("hi", "hello", "bye", "ciao")}
    assert parse_comparison(longer).responses == {
        "chosen": chat("", "hello")[1:],
        "rejected": record["chosen"][1:],
    }


def test_string_prompt_with_dialogues():
    """As in UltraFeedback: the prompt is the first user message of both dialogues."""
    dialogue = {"chosen": chat("hi", "hello"), "rejected": chat("hi", "go")}
    replies = {"chosen": chat("", "hello")[1:], "rejected": chat("", "go")[1:]}
    for record in (dialogue | {"prompt": "hi"}, dialogue | {"prompt": chat("hi")}, dialogue):
        assert parse_comparison(record).responses == replies
        assert find_prompt(record) == parse_comparison(record).prompt == chat("hi")
    replies = {"chosen": chat("", "hello")[1:], "rejected": chat("", "go")[1:]}
    assert (
        parse_comparison(replies | {"prompt": "hi"}).prompt
        == find_prompt(replies | {"prompt": "hi"})
        == chat("hi")
    )
    ranked = {"prompt": "hi", "responses": [dialogue["chosen"], dialogue["rejected"]], "ranks": [1, 2]}
    assert parse_comparison(ranked).prompt == find_prompt(ranked) == chat("hi")


def test_messages_have_priority_over_a_prompt_string():
    """As in UltraChat: training and generation use the same conversation."""
    record = {"prompt": "hi", "messages": chat("hi", "hello", "bye", "so long")}
    assert find_prompt(record) == chat("hi", "hello", "bye")
    assert text_of(demonstration_segments(record, DEFAULT, EOS)).startswith(
        text_of(prompt_segments(find_prompt(record), DEFAULT, EOS))
    )


def test_content_parts_are_joined_and_empty_keys_removed():
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "it."}]
    extra = {"tool_calls": [], "name": None, "refusal": ""}
    messages = [{"role": "user", "content": parts, **extra}, {"role": "assistant", "content": "It.", **extra}]
    assert find_prompt({"messages": messages}) == chat("Name it.")
    assert demonstration_segments({"messages": messages}, DEFAULT, EOS) == demonstration_segments(
        {"messages": chat("Name it.", "It.")}, DEFAULT, EOS
    )


def test_default_weight_is_removed():
    plain = chat("Name it.", "It.")
    for reply_weight, other_weight in ((1, 0), (1.0, 0.0)):
        weighted = [{**plain[0], "weight": other_weight}, {**plain[1], "weight": reply_weight}]
        assert demonstration_segments({"messages": weighted}, DEFAULT, EOS) == demonstration_segments(
            {"messages": plain}, DEFAULT, EOS
        )


def test_each_response_may_repeat_the_prompt():
    expected = {"chosen": chat("", "hello")[1:], "rejected": chat("", "go")[1:]}
    for prompt in (chat("hi"), [BRIEF, *chat("hi")]):
        record = {
            "prompt": prompt,
            "chosen": [*prompt, *expected["chosen"]],
            "rejected": expected["rejected"],
        }
        assert (parse_comparison(record).prompt, parse_comparison(record).responses) == (prompt, expected)


def test_ranked_responses_are_dialogues_with_one_prompt():
    record = {"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [3, 1, 1.5]}
    assert parse_comparison(record).ranks == [3, 1, 1.5]
    assert compare(record) == [[Segment("Q"), Segment(x, is_response=True, ends=True)] for x in "abc"]
    assert compare(record | {"prompt": chat("Q")})[1] == dialogue_segments(chat("Q"), "b", DEFAULT, EOS)
    assert find_prompt(record) == "Q"


def test_prompt_of_every_kind_of_record():
    assert find_prompt({"prompt": "Q", "completion": "A"}) == "Q"
    assert find_prompt({"messages": chat("hi", "hello", "bye", "so long")}) == chat("hi", "hello", "bye")
    assert find_prompt({"messages": chat("hi")}) == chat("hi")


SOME, BRIEF = chat("a"), {"role": "system", "content": "Be brief."}
DEMONSTRATION, PREFERENCE, PROMPT = demonstration_segments, compare, lambda r, *_: find_prompt(r)
RANKING = {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    "function, record, message",
    [
        (DEMONSTRATION, {"completion": "a"}, "'prompt' is missing"),
        (DEMONSTRATION, {"prompt": "a"}, "'completion' is missing"),
        (DEMONSTRATION, {"prompt": "a", "completion": ""}, "'completion' is empty"),
        (DEMONSTRATION, {"prompt": " \n", "completion": "a"}, "'prompt' is empty"),
        (DEMONSTRATION, {"prompt": "a", "completion": 3}, "'completion' is int"),
        (DEMONSTRATION, {"prompt": "a", "completion": None}, "'completion' is NoneType"),
        (DEMONSTRATION, {"prompt": "a", "completion": chat("b")}, "'prompt' is not one of the user messages"),
        (DEMONSTRATION, {"prompt": SOME, "completion": SOME}, "'completion' must end with an assistant"),
        (DEMONSTRATION, {"prompt": SOME, "completion": chat("b", "c")}, "does not begin with 'prompt'"),
        (DEMONSTRATION, {"prompt": chat("a "), "completion": chat("a", "c")}, "does not begin with 'prompt'"),
        (
            PREFERENCE,
            {"prompt": SOME, "chosen": [BRIEF, *chat("a", "b")], "rejected": [BRIEF, *chat("a", "c")]},
            "'chosen' is a dialogue that does not begin with 'prompt'",
        ),
        (
            DEMONSTRATION,
            {"prompt": chat("a", "b"), "completion": [BRIEF, *chat("a", "b", "c", "d")]},
            "'completion' is a dialogue that does not begin with 'prompt'",
        ),
        (DEMONSTRATION, {"messages": []}, "'messages' is empty"),
        (DEMONSTRATION, {"messages": "text"}, "'messages'"),
        (DEMONSTRATION, {"messages": SOME}, "'messages' has no assistant message"),
        (DEMONSTRATION, {"messages": ["text"]}, "'messages': message 0 must be an object"),
        (DEMONSTRATION, {"messages": [*SOME, {"role": "user"}]}, "'messages': message 1 must be an object"),
        (DEMONSTRATION, {"messages": [{"role": "tool", "content": "a"}]}, "message 0 has role 'tool'"),
        (DEMONSTRATION, {"messages": chat("a", " ")}, "'messages': message 1 has no content"),
        (DEMONSTRATION, {"messages": [{**SOME[0], "tool_calls": [{}]}]}, "message 0 has 'tool_calls'"),
        (DEMONSTRATION, {"messages": [*SOME, {**SOME[0], "weight": 1}]}, "message 1 has 'weight'"),
        (DEMONSTRATION, {"messages": [*SOME, {**chat("", "b")[1], "weight": 0}]}, "message 1 has 'weight'"),
        (DEMONSTRATION, {"messages": [{**SOME[0], "name": "Ann"}]}, "message 0 has 'name'"),
        (DEMONSTRATION, {"messages": [{"role": "user", "content": 3}]}, "message 0 has content of type int"),
        (
            DEMONSTRATION,
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "message 0 has a content part of type 'image'; only text",
        ),
        (
            DEMONSTRATION,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "message 0 has a content part of type 'text' whose 'text' is not a string",
        ),
        (PREFERENCE, {"prompt": "a", "rejected": "b"}, "'chosen' is missing"),
        (PREFERENCE, {"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        (PREFERENCE, {"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
        (PREFERENCE, {"prompt": {}, "chosen": "b", "rejected": "c"}, "'prompt' is dict"),
        (PREFERENCE, {"prompt": "a", "chosen": "b", "rejected": SOME}, "'rejected' is a list of messages"),
        (PREFERENCE, {"chosen": "b", "rejected": SOME}, "'chosen' and 'rejected' must both be"),
        (PREFERENCE, {"chosen": "ab", "rejected": "cd"}, "'chosen' and 'rejected' have no common beginning"),
        (PREFERENCE, {"chosen": "ab", "rejected": "ab"}, "'chosen' and 'rejected' are identical"),
        (PREFERENCE, {"chosen": "ab", "rejected": "abc"}, "'chosen' and 'rejected' have no common beginning"),
        (
            PREFERENCE,
            {"chosen": chat("q"), "rejected": chat("q", "a")},
            "'chosen' must end with an assistant",
        ),
        (
            PREFERENCE,
            {"prompt": "x", "chosen": chat("q", "a"), "rejected": chat("q", "b")},
            "'prompt' is not one of the user messages in 'chosen' and 'rejected'",
        ),
        (
            PREFERENCE,
            {"prompt": chat("q", "a"), "chosen": "b", "rejected": "c"},
            "so 'chosen' cannot answer it",
        ),
        (PREFERENCE, RANKING | {"prompt": ""}, "'prompt' is empty"),
        (PREFERENCE, {"responses": ["b", "c"], "ranks": [1, 2]}, "'prompt' is missing (a ranking has"),
        (PREFERENCE, {"prompt": "a", "responses": ["b", "c"]}, "'ranks' is missing"),
        (PREFERENCE, {"prompt": "a", "ranks": [1, 2]}, "'responses' is missing"),
        (PREFERENCE, RANKING | {"responses": "bc"}, "'responses' must be a list of two"),
        (PREFERENCE, RANKING | {"responses": ["b"], "ranks": [1]}, "'responses' must be a list of two"),
        (PREFERENCE, RANKING | {"responses": ["b", " "]}, "'responses[1]' is empty"),
        (PREFERENCE, RANKING | {"responses": ["b", SOME]}, "'responses[1]' is a list of messages"),
        (PREFERENCE, RANKING | {"ranks": [1, 2, 3]}, "'ranks' must be a list of 2 numbers"),
        (PREFERENCE, RANKING | {"ranks": {"b": 1}}, "'ranks' must be a list of 2 numbers"),
        (PREFERENCE, RANKING | {"ranks": [1, "2"]}, "'ranks': '2' is not a number"),
        (PREFERENCE, RANKING | {"ranks": [1, True]}, "'ranks': True is not a number"),
        (PREFERENCE, RANKING | {"ranks": [1, float("nan")]}, "'ranks': nan is not a number"),
        (PREFERENCE, RANKING | {"ranks": [2, 2.0]}, "'ranks': all are equal"),
        (PROMPT, {"text": "a"}, "'prompt' is missing"),
        (PROMPT, {"prompt": 1.5}, "'prompt' is float"),
        (PROMPT, {"messages": chat("a", "b")[1:]}, "'messages' has nothing before"),
        (PROMPT, {"messages": "plain text"}, "'messages'"),
    ],
)
def test_error_names_the_field(function, record, message):
    with pytest.raises(ValueError) as error:
        function(record, DEFAULT, EOS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

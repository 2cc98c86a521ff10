"""From records to segments: the exact text, what is a response, and messages that name the field."""

from collections.abc import Callable

import pytest
from jinja2 import Environment

from common.formatting import (
    DEFAULT_CHAT_TEMPLATE,
    Segment,
    comparison,
    demonstration_segments,
    dialogue_segments,
    find_prompt,
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
COUNTING = "{{ messages | length }}" + NO_EOS  # what comes first depends on what comes last
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
    """Messages of a user and an assistant by turns."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}] * bool(system) + turns


def compare(record: dict, render: Callable = DEFAULT, eos: str = EOS) -> list[list[Segment]]:
    return preference_segments(comparison(record), render, eos)


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
def test_no_eos_after_a_completion_that_was_cut(prompt):
    record = {"prompt": prompt, "completion": " A"}
    whole = demonstration_segments({**record, "ended": True}, DEFAULT, EOS)
    assert whole == demonstration_segments(record, DEFAULT, EOS)
    assert text_of(whole) == text_of(demonstration_segments({**record, "ended": False}, DEFAULT, EOS)) + EOS
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
def test_segments_together_are_the_rendered_conversation(text):
    render, messages = template(text), chat("one", "two", "three", "four", system="zero")
    segments = demonstration_segments({"messages": messages}, render, EOS)
    assert text_of(segments) == render(messages, False).rstrip("\n")


def test_eos_comes_once_also_when_the_template_has_none():
    segments = demonstration_segments({"messages": chat("a", "b", "c", "d")}, template(NO_EOS), EOS)
    assert text_of(segments) == "[user]a[assistant]b[user]c[assistant]d" + EOS


def test_messages_after_the_last_reply_are_left_out():
    messages = chat("hi", "hello", "and then?")
    expected = demonstration_segments({"messages": messages[:2]}, DEFAULT, EOS)
    assert demonstration_segments({"messages": messages}, DEFAULT, EOS) == expected


def test_a_prompt_of_messages_ends_where_the_response_begins():
    messages = chat("hi", "hello", "bye")
    prompt = prompt_segments(messages, DEFAULT, EOS)
    whole = dialogue_segments(messages, "so long", DEFAULT, EOS)
    assert text_of(prompt) == f"\n\nHuman: hi\n\nAssistant: hello{EOS}\n\nHuman: bye\n\nAssistant:"
    assert text_of(whole) == text_of(prompt) + " so long" + EOS


def test_only_the_last_reply_of_a_dialogue_is_the_response():
    segments = dialogue_segments(chat("hi", "hello", "bye"), chat("?", "so long")[1:], DEFAULT, EOS)
    assert [s.is_response for s in segments] == [False, False, False, True]
    assert [s.ends for s in segments] == [False, True, False, True]


@pytest.mark.parametrize(
    "text, contents",
    [(COUNTING, "ab"), (LOSES_CONTEXT, "ab"), (FORGETS_REPLIES, "abcd"), (FORGETS_REPLIES, "abc")],
)
def test_a_template_that_rewrites_the_beginning_is_refused(text, contents):
    with pytest.raises(ValueError, match="chat template does not render"):
        prompt_segments(chat(*contents), template(text), EOS)


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


def test_ranked_responses_are_dialogues_with_one_prompt():
    record = {"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [3, 1, 1.5]}
    assert comparison(record).ranks == [3, 1, 1.5]
    assert compare(record) == [[Segment("Q"), Segment(x, is_response=True, ends=True)] for x in "abc"]
    assert compare(record | {"prompt": chat("Q")})[1] == dialogue_segments(chat("Q"), "b", DEFAULT, EOS)
    assert find_prompt(record) == "Q"


def test_prompt_of_every_kind_of_record():
    assert find_prompt({"prompt": "Q", "completion": "A"}) == "Q"
    assert find_prompt({"messages": chat("hi", "hello", "bye", "so long")}) == chat("hi", "hello", "bye")
    assert find_prompt({"messages": chat("hi")}) == chat("hi")


SOME = chat("a")
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
        (DEMONSTRATION, {"prompt": "a", "completion": chat("b")}, "'completion' is a list of messages"),
        (DEMONSTRATION, {"prompt": SOME, "completion": chat("b")}, "'completion' must end with an assistant"),
        (DEMONSTRATION, {"messages": []}, "'messages' is empty"),
        (DEMONSTRATION, {"messages": "text"}, "'messages'"),
        (DEMONSTRATION, {"messages": SOME}, "'messages' has no assistant message"),
        (DEMONSTRATION, {"messages": ["text"]}, "'messages': message 0 must be an object"),
        (DEMONSTRATION, {"messages": [*SOME, {"role": "user"}]}, "'messages': message 1 must be an object"),
        (DEMONSTRATION, {"messages": [{"role": "tool", "content": "a"}]}, "message 0 has role 'tool'"),
        (DEMONSTRATION, {"messages": chat("a", " ")}, "'messages': message 1 has no content"),
        (PREFERENCE, {"prompt": "a", "rejected": "b"}, "'chosen' is missing"),
        (PREFERENCE, {"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        (PREFERENCE, {"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
        (PREFERENCE, {"prompt": {}, "chosen": "b", "rejected": "c"}, "'prompt' is dict"),
        (PREFERENCE, {"prompt": "a", "chosen": "b", "rejected": SOME}, "'rejected' is a list of messages"),
        (PREFERENCE, {"chosen": "b", "rejected": SOME}, "'chosen' and 'rejected' must both be"),
        (PREFERENCE, {"chosen": "ab", "rejected": "cd"}, "'chosen' and 'rejected' have no common beginning"),
        (PREFERENCE, {"chosen": "ab", "rejected": "ab"}, "'chosen' and 'rejected' do not differ"),
        (PREFERENCE, {"chosen": "ab", "rejected": "abc"}, "'chosen' and 'rejected' do not differ"),
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
def test_a_bad_record_is_a_message_that_names_the_field(function, record, message):
    with pytest.raises(ValueError) as error:
        function(record, DEFAULT, EOS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)

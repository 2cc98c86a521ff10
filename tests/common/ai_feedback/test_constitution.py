"""Constitutions and templates: reading files and building questions."""

from collections import Counter
from pathlib import Path

import pytest

from common.ai_feedback.constitution import as_text, draw_principle, fill, read_constitution, read_template
from common.ai_feedback.options import SHIPPED
from common.runtime.options import UserError

PLACEHOLDERS = {
    "critique": ("prompt", "response", "principle"),
    "revision": ("prompt", "response", "principle", "critique"),
    "judge": ("prompt", "response_a", "response_b", "principle"),
}


def test_the_shipped_files_are_valid():
    principles = read_constitution(str(SHIPPED / "constitution.yaml"))
    assert 8 <= len(set(principles)) == len(principles) <= 12
    for name, placeholders in PLACEHOLDERS.items():
        assert read_template(name, str(SHIPPED / f"{name}.txt"), placeholders)


def test_yaml_and_text_give_the_same_principles(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("# Two.\n- Be kind.\n- 'Be brief: no more than asked.'\n")
    (tmp_path / "a.txt").write_text("\ufeff# Two.\nBe kind.\n\n  Be brief: no more than asked.\n", "utf-8")
    expected = ["Be kind.", "Be brief: no more than asked."]
    assert read_constitution(str(tmp_path / "a.yaml")) == expected
    assert read_constitution(str(tmp_path / "a.txt")) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"", "a.yaml: has no principles"),
        ("a.yaml", b"[]", "a.yaml: has no principles"),
        ("a.txt", b"# Only this.\n\n", "a.txt: has no principles"),
        ("a.yaml", b"principles: [a]", "a.yaml: must be a list of principles, not dict"),
        ("a.yaml", b"- Be kind.\n- Be brief: always.", "a.yaml: principle 2 is {'Be brief': 'always.'}"),
        ("a.yaml", b"- Be kind.\n- ' '", "a.yaml: principle 2 is ' '; it must be text"),
        ("a.yaml", b"- 'Be kind.", "a.yaml: not valid YAML: .*line 1"),
        ("a.txt", b"Sei gr\xfcn.", "a.txt: not UTF-8 text"),
        ("no.yaml", None, "no.yaml: No such file"),
    ],
)
def test_an_invalid_constitution_is_an_error_of_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_constitution(str(tmp_path / name))
    assert "\n" not in str(error.value) and str(error.value).startswith("--constitution ")


def test_a_template_without_a_placeholder_is_an_error(tmp_path: Path):
    (tmp_path / "t.txt").write_text("{prompt} {response_a} {response_c} {principle}")
    with pytest.raises(UserError, match=r"--judge_template .*t.txt: lacks \{response_b\}; it must have"):
        read_template("judge_template", str(tmp_path / "t.txt"), PLACEHOLDERS["judge"])
    with pytest.raises(UserError, match=r"--judge_template .*: Is a directory"):
        read_template("judge_template", str(tmp_path), PLACEHOLDERS["judge"])


def test_texts_are_filled_in_verbatim():
    """Braces in the texts are not filled, and other braces of the template stay."""
    (message,) = fill('{"a": 1} {prompt}|{response}|{other}', prompt="{response} \\1", response="{prompt}")
    assert message == {"role": "user", "content": '{"a": 1} {response} \\1|{prompt}|{other}'}


def test_principles_are_drawn_uniformly_and_reproducibly():
    """Uniform within four standard deviations; a function of content, seed and round."""
    drawn = [draw_principle("abcd", f"prompt {number}", seed=0) for number in range(4000)]
    assert drawn == [draw_principle("abcd", f"prompt {number}", seed=0) for number in range(4000)]
    assert all(abs(count - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for count in Counter(drawn).values())
    for other in ({"seed": 1}, {"seed": 0, "round": 1}):
        again = [draw_principle("abcd", f"prompt {number}", **other) for number in range(4000)]
        same = sum(a == b for a, b in zip(drawn, again, strict=True))
        assert abs(same - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5


def test_conversations_as_text():
    turns = [{"role": role, "content": f" {role[0]} "} for role in ("system", "user", "assistant", "user")]
    assert as_text(turns) == "System: s\n\nHuman: u\n\nAssistant: a\n\nHuman: u"
    assert as_text(turns[2:3]) == "a" and as_text(" as it is \n") == "as it is"

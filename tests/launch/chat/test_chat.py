"""The chat, driven by lines of input: prompts, sampling, scores, commands, saved preferences."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from common.data.records import read_all
from common.text.conversation import DEFAULT_CHAT_TEMPLATE
from common.text.prompts import tokenize_prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from launch.chat import main as chat
from step2_reward.data import tokenize_preference
from tests.end_to_end.test_bad_input import check_refusal
from tests.end_to_end.test_launch import LAUNCH

GREEDY = ["--temperature", "0"]
SHORT = ["--max_response_length", "12"]
RunChat = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def untemplated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("untemplated")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(world / "model")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a mean and a standard deviation, as step 2 writes it."""
    folder = tmp_path_factory.mktemp("reward")
    shutil.copytree(world / "model", folder, dirs_exist_ok=True)
    config = LlamaConfig.from_pretrained(folder, num_labels=1)
    config.reward_mean, config.reward_std = 0.5, 0.01
    torch.manual_seed(2)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> RunChat:
    """Run the chat on lines of input; returns the reply to each line, and the token ids of each prompt. The
    test models rarely sample EOS; `ends` forces it at the length limit.
    """

    def run(lines: list[str], models: list[Path], *words: str, ends: bool = False) -> SimpleNamespace:
        prompts, generate = [], LlamaForCausalLM.generate

        def spy(self, inputs: torch.Tensor, **keywords: object) -> torch.Tensor:
            prompts.append(inputs[0].tolist())
            settings = keywords["generation_config"]
            settings.forced_eos_token_id = settings.eos_token_id if ends else None
            return generate(self, inputs, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(LlamaForCausalLM, "generate", spy)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
            patch.setattr(sys, "argv", ["chat", "--model_name_or_path", *map(str, models), *SHORT, *words])
            chat.main()
        replies = capsys.readouterr().out.split("\n> ")[1:]
        assert len(replies) == len(lines) + 1 and replies.pop() == "\n"
        return SimpleNamespace(replies=replies, prompts=prompts)

    return run


def answer(reply: str) -> str:
    """The answer of a single model, without the note after it."""
    return re.sub(r"\n\([^\n]*\)\n$", "", reply).strip()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def plain(model: Path, messages: list[dict[str, str]]) -> torch.Tensor:
    """Token ids (1, P) of a prompt, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, return_tensors="pt").input_ids


@pytest.mark.parametrize("name", ["model", "untemplated"])
def test_prompts_equal_those_of_training(
    world: Path, untemplated: Path, talk: RunChat, tmp_path: Path, name: str
) -> None:  # fmt: skip
    """Step 3 gives the same ids for the conversation, and step 2 for the saved preference."""
    model, file = {"model": world / "model", "untemplated": untemplated}[name], tmp_path / "pairs.jsonl"
    lines = ["Hello!", "And you?", "/regenerate", "/save old", "/regenerate", "/save NEW"]
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))  # without a newline
    result = talk(lines, [model], "--save_to", str(file), ends=True)
    encoder, (records, _) = SegmentEncoder(load_tokenizer(str(model))), read_all([str(file)], dict)
    first, second, third = (answer(result.replies[i]) for i in (1, 2, 4))
    turns = [user("Hello!"), assistant(answer(result.replies[0])), user("And you?")]
    assert records.pop(0)["chosen"] == "b"
    assert records == [
        {"prompt": turns, "chosen": first, "rejected": second},
        {"prompt": turns, "chosen": third, "rejected": second},
    ]
    assert result.prompts[0] == plain(model, turns[:1])[0].tolist()
    assert result.prompts[1:] == [tokenize_prompt({"prompt": turns}, encoder, 244, "error")[0].ids] * 3
    for record in records:
        row, _ = tokenize_preference(record, encoder, 256, "error", use_margin=False)
        assert row.prompt_ids == result.prompts[1] and row.ranks == [0, 1]


def test_sampling_matches_the_model(world: Path, talk: RunChat, tmp_path: Path) -> None:
    """Greedy answers equal those of transformers, without the penalties in the folder's generation config.
    Sampled answers depend on the seed, and differ from each other.
    """
    model, tokenizer = tmp_path / "penalised", AutoTokenizer.from_pretrained(world / "model")
    shutil.copytree(world / "model", model)
    GenerationConfig(repetition_penalty=9.0).save_pretrained(model)
    ids = plain(model, [user("Hello!")])
    output = LlamaForCausalLM.from_pretrained(world / "model").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    greedy = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    for words in (GREEDY, ["--top_p", "1e-6"], ["--temperature", "1e-4"]):
        assert {*map(answer, talk(["Hello!", "/regenerate"], [model], *words).replies)} == {greedy}
    lines = ["Hello!", "And you?", "/regenerate", "/reset", "Hello!"]
    sampled = talk(lines, [model])
    assert talk(lines, [model]).replies == sampled.replies
    assert talk(lines, [model], "--seed", "1").replies != sampled.replies
    assert len({answer(sampled.replies[i]) for i in (0, 1, 2, 4)}) == 4
    assert sampled.prompts[3] == sampled.prompts[0] == ids[0].tolist()  # /reset drops the history
    lines, words = ["Hello!", *["/regenerate"] * 79], ["--temperature", "1e6", "--max_response_length", "1"]
    assert len({*talk(lines, [model], *words).replies}) > 50  # samples from all tokens


def test_two_models_are_compared(
    world: Path, untemplated: Path, reward_model: Path, talk: RunChat, tmp_path: Path
) -> None:  # fmt: skip
    """Each uses its own tokenizer; scores equal those of transformers; the chosen answer continues."""
    models, file = [world / "model", untemplated], tmp_path / "pairs.jsonl"
    lines = ["Hello!", "/save b", "/b", "And you?", "Why?"]
    words = ["--reward_model_name_or_path", str(reward_model), "--save_to", str(file)]
    result = talk(lines, models, *words, ends=True)
    pattern = r"A: (.*)\n\((?:[^\n]*, )?score (\S+)\)\nB: (.*)\n\((?:[^\n]*, )?score (\S+)\)\n"
    parts = [re.fullmatch(pattern, result.replies[i], re.DOTALL).groups() for i in (0, 3)]
    (a, score_a, b, score_b), (next_a, *_) = parts
    a, b, next_a = a.strip(), b.strip(), next_a.strip()
    record = json.loads(file.read_text())
    assert record == {"prompt": [user("Hello!")], "chosen": b, "rejected": a}
    turns = [user("Hello!"), assistant(b), user("And you?"), assistant(next_a), user("Why?")]
    for number in (1, 3, 5):
        for index, model in enumerate(models):
            ids = plain(model, turns[:number])[0].tolist()
            assert result.prompts[number - 1 + index] == ids
    scorer = LlamaForSequenceClassification.from_pretrained(reward_model)
    for text, score in ((a, score_a), (b, score_b)):
        ids = plain(reward_model, [user("Hello!")])
        tokenizer = AutoTokenizer.from_pretrained(reward_model)
        reply = tokenizer(text + tokenizer.eos_token, add_special_tokens=False, return_tensors="pt").input_ids
        expected = (scorer(torch.cat([ids, reply], 1)).logits.item() - 0.5) / 0.01
        assert float(score) == pytest.approx(expected, abs=1e-3)


def test_long_conversation_drops_its_oldest_messages(world: Path, talk: RunChat) -> None:
    model, turns = world / "model", []
    questions = [f"{number}: {'Hello! ' * 3 * number}".strip() for number in range(8)]
    result = talk(questions, [model], "--max_response_length", "60")
    dropped = []
    for question, reply, ids in zip(questions, result.replies, result.prompts, strict=True):
        turns.append(user(question))
        rest = [plain(model, turns[first:])[0].tolist() for first in range(0, len(turns), 2)]
        dropped.append(next(number for number, ids in enumerate(rest) if len(ids) <= 256 - 60))
        assert ids == rest[dropped[-1]] and ("oldest messages are left out" in reply) == (dropped[-1] > 0)
        turns.append(assistant(answer(reply.split("left out)\n")[-1])))
    assert dropped[0] == 0 and dropped[-1] > 1


def test_ctrl_c_stops_only_the_answer(
    world: Path, talk: RunChat, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The partial answer remains, and the conversation continues from it."""
    complete = answer(talk(["Hello!"], [world / "model"], *GREEDY).replies[0])
    interrupt(monkeypatch, at=8)
    result = talk(["Hello!", "And you?"], [world / "model"], *GREEDY)
    part = answer(result.replies[0])
    assert (
        part and complete.startswith(part) and part != complete and result.replies[0].endswith("(stopped)\n")
    )
    turns = [user("Hello!"), assistant(part), user("And you?")]
    assert result.prompts[1] == plain(world / "model", turns)[0].tolist()
    assert "stopped" not in result.replies[1]


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Press Ctrl-C during forward pass number `at`."""
    forward, calls = LlamaForCausalLM.forward, []

    def interrupted(self, *args: object, **keywords: object) -> object:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **keywords)

    monkeypatch.setattr(LlamaForCausalLM, "forward", interrupted)


def test_answer_stopped_at_once_keeps_the_previous_one(
    world: Path, talk: RunChat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    """The history stays, the stopped answer is not saved, and a new answer is."""
    model, file = world / "model", tmp_path / "pairs.jsonl"
    interrupt(monkeypatch, at=13)  # the first token of the second answer
    lines = ["Hello!", "/regenerate", "/save old", "/regenerate", "/save old", "And you?"]
    result = talk(lines, [model], "--save_to", str(file), ends=True)
    first, other = answer(result.replies[0]), answer(result.replies[3])
    assert result.replies[1].endswith("(stopped, empty)\n")
    assert result.replies[2] == "error: not saved: answer new is incomplete (stopped, empty)\n"
    assert json.loads(file.read_text())["chosen"] == first
    turns = [user("Hello!"), assistant(other), user("And you?")]
    assert result.prompts[-1] == plain(model, turns)[0].tolist()
    interrupt(monkeypatch, at=13)
    result = talk(["Hello!", "/regenerate", "And you?"], [model], ends=True)
    turns = [user("Hello!"), assistant(answer(result.replies[0])), user("And you?")]
    assert result.prompts[-1] == plain(model, turns)[0].tolist()


def test_wrong_commands_are_one_line(world: Path, talk: RunChat, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    expected = [
        ("/regenerate", "error: there is no message"),
        ("/save a", "error: /save needs two answers"),
        ("/b", "error: there is no answer 'b'"),
        ("/hepl", "error: no command '/hepl'; /help"),
        ("Hello!", ""),
        ("/save", "error: /save needs two answers"),
        ("/old", "error: there is no answer 'old'"),
        ("/regenerate", ""),
        ("/save", "error: name the better answer: /save new or /save old"),
        ("/save b", "error: name the better answer"),
        ("/save old", "error: not saved: answer new is incomplete (truncated at 12 tokens)"),
        ("/help", "/regenerate "),
    ]
    lines = [line for line, _ in expected]
    result = talk(lines, [world / "model"], "--save_to", str(file), *GREEDY)
    for reply, (line, beginning) in zip(result.replies, expected, strict=True):
        assert reply.startswith(beginning), line
        assert "error" not in beginning or reply.count("\n") == 1
    lines = ["Hello!", "/regenerate", "/save old"]
    result = talk(lines, [world / "model"], "--save_to", str(file), *GREEDY, ends=True)
    assert result.replies[2] == "error: not saved: both answers are the same\n"
    assert not file.exists()
    assert "--save_to" in talk(["Hello!", "/save"], [world / "model"]).replies[1]


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--model_name_or_path", "MODEL", "MODEL", "MODEL"], ["--model_name_or_path", "one model or two"]),
        (["--model_name_or_path", "FOLDER"], ["FOLDER"]),
        (["--max_response_length", "256"], ["--max_response_length 256", "256 positions"]),
        (["--temperature", "-1"], ["--temperature -1", "at least 0"]),
        (["--save_to", "FOLDER/no/pairs.jsonl"], ["--save_to", "no such folder"]),
        (["--save_to", "FOLDER/pairs.txt"], ["--save_to", ".jsonl"]),
        (["--reward_model_name_or_path", "MODEL"], ["--reward_model_name_or_path", "not a reward model"]),
    ],
)
def test_mistakes_are_one_line(world: Path, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    paths = {"FOLDER": str(tmp_path), "MODEL": str(world / "model")}
    for name, path in paths.items():
        words, parts = ([text.replace(name, path) for text in texts] for texts in (words, parts))
    given = ["--model_name_or_path", str(world / "model"), *words]
    check_refusal("launch.chat.main", given, parts, tmp_path, tmp_path / "out")


@pytest.mark.end_to_end
def test_script_ends_with_the_input(world: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(world / "model"), "--max_response_length", "4"]
    done = subprocess.run(
        ["bash", str(LAUNCH / "chat.sh"), *words], input="Hello!\n/quit\nnever read\n", cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("\n> ") == 2 and not list(tmp_path.iterdir())

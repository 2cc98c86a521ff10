"""Critique and revision: each kind of answer, several ranks, resume, and training on the result."""

import json
import os
import signal
from pathlib import Path

import pytest

from common.generation.generate import PolicyAnswer
from common.numeric.intervals import wilson
from common.text.prompts import Prompt
from common.text.truncation import Dropped
from step1_sft.critique import Assistant, critique_metrics, format_critique_metrics, revise
from step1_sft.options import CritiqueOptions
from tests.end_to_end.test_bad_input import check_refusal
from tests.ranks import start_stage, succeed
from tests.stages import common as common_options
from tests.stages import sft


class Script(Assistant):
    """An assistant with scripted answers, to which questions with 'long' are too long."""

    def __init__(self, script: list[list[PolicyAnswer]]) -> None:
        self._script, self.questions = iter(script), []
        self.steps = []
        self._sample, self._encode = self.sample, self.encode

    def sample(self, prompts: dict, step: int) -> dict[int, PolicyAnswer]:
        self.steps.append(step)
        return dict(zip(prompts, next(self._script), strict=True))

    def encode(self, record: dict) -> tuple[Prompt, bool]:
        content = record["prompt"][0]["content"]
        if "long" in content:
            raise Dropped("too long")
        self.questions.append(content)
        return Prompt([0], ""), False


def answers(*texts: str) -> list[PolicyAnswer]:
    """Make answers; a dash at the end marks a truncated one."""
    return [PolicyAnswer(text.rstrip("-"), not text.endswith("-")) for text in texts]


CHAT = Prompt([1, 2], json.dumps({"prompt": [{"role": "user", "content": "Hi?"}]}))
TEXT = Prompt([3], json.dumps({"prompt": "Q: Who?\nA:"}))
TEMPLATES = ("C|{prompt}|{response}|{principle}", "R|{prompt}|{response}|{principle}|{critique}")


def test_revise_handles_each_kind_of_answer():
    """Four answers: revised twice; both revisions unusable; never ended; question too long."""
    long = Prompt([4], json.dumps({"prompt": "a long one"}))
    model = Script([
        answers(" one", " draft", " on and on-", " too"),
        answers("bad one", "bad draft", "endless"), answers("two\n", " ", "still on and on-"),
        answers("bad two", "bad draft", "endless"), answers(" three", "cut off-", "and on-"),
    ])  # fmt: skip
    options = CritiqueOptions(revision_rounds=2)
    rows = dict(enumerate([CHAT, TEXT, CHAT, long], start=8))
    records = revise(rows, model, ["P"], TEMPLATES, options)
    assert model.steps == [0, 1, 2, 3, 4]
    assert model.questions[:3] == ["C|Human: Hi?|one|P", "C|Q: Who?\nA:|draft|P", "C|Human: Hi?|on and on|P"]
    assert model.questions[3] == "R|Human: Hi?|one|P|bad one"
    assert model.questions[6] == "C|Human: Hi?|two|P" and model.questions[9] == "R|Human: Hi?|two|P|bad two"
    assert [record["completion"] for record in records] == ["three", " draft", "", " too"]
    assert [record["draft"] for record in records] == ["one", " draft", "on and on", " too"]
    assert (
        records[0]["prompt"] == [{"role": "user", "content": "Hi?"}] and records[1]["prompt"] == "Q: Who?\nA:"
    )
    assert records[0]["trace"] == [
        {"principle": "P", "critique": "bad one", "revision": "two", "is_used": True},
        {"principle": "P", "critique": "bad two", "revision": "three", "is_used": True},
    ]
    assert [step["is_used"] for step in records[1]["trace"]] == [False, False] and records[3]["trace"] == []
    metrics = critique_metrics(records)
    assert (metrics["prompts"], metrics["demonstrations"]) == (4, 3)
    assert (metrics["revisions"], metrics["revisions_used"]) == (6, 2)
    assert metrics["changed"] == {"share": 1 / 3, "interval": wilson(1 / 3, 3), "of": 3}
    assert (metrics["draft_length"], metrics["completion_length"]) == ((3 + 6 + 4) / 3, (5 + 6 + 4) / 3)
    text = format_critique_metrics(metrics)
    assert "33.3% of 3" in text and "1 prompts dropped" in text
    assert "no records to measure" in format_critique_metrics(critique_metrics(records[2:3]))


@pytest.fixture(scope="module")
def model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained until its answers end."""
    folder = tmp_path_factory.mktemp("model")
    succeed("step1_sft.main", [*sft(world, folder, steps=30), "--learning_rate", "1e-2"], folder)
    return folder / "final"


def words(model: Path, folder: Path, output: str, *more: str) -> list[str]:
    (folder / "critique.txt").write_text("{principle} {prompt} {response} ?")
    (folder / "revision.txt").write_text("{principle} {prompt} {response} {critique} !")
    return [
        "--model_name_or_path", str(model), "--prompt_data", str(folder / "prompts.jsonl"),
        "--critique_template", str(folder / "critique.txt"), "--output_dir", str(folder / output),
        "--revision_template", str(folder / "revision.txt"), "--generation_batch_size", "8",
        "--max_response_length", "40", *more,
    ]  # fmt: skip


def make_prompts(world: Path, folder: Path, count: int) -> None:
    lines = (world / "prompts.jsonl").read_text().splitlines()[:count]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


def test_output_is_the_same_on_two_ranks_and_after_a_resume_and_trains_step_1(
    world: Path, model: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Byte-identical on one rank, on two, and after a stop and a resume with another batch size."""
    make_prompts(world, tmp_path, 60)
    succeed("step1_sft.critique", words(model, tmp_path, "one"), tmp_path)
    succeed("step1_sft.critique", words(model, tmp_path, "two"), tmp_path, ranks=2)
    stopped = words(model, tmp_path, "stopped")
    running = start_stage("step1_sft.critique", stopped, tmp_path)
    journal = tmp_path / "stopped/journal"
    running.wait_for(lambda: journal.exists() and journal.stat().st_size > 0)
    os.kill(running.pids[0], signal.SIGTERM)
    assert running.result().codes == [75]
    done = journal.read_text()
    succeed("step1_sft.critique", [*stopped, "--generation_batch_size", "5"], tmp_path)
    assert journal.read_text().startswith(done)
    for name in ("demonstrations.jsonl", "report.json"):
        assert len({(tmp_path / out / name).read_bytes() for out in ("one", "two", "stopped")}) == 1
    report = json.loads((tmp_path / "one/report.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "one/demonstrations.jsonl").read_text().splitlines()]
    assert report["prompts"] == 60 and report["demonstrations"] == len(records) > 20
    assert 0.2 < report["changed"]["share"] <= 1.0
    for record in records:
        used = [step["revision"] for step in record["trace"] if step["is_used"]]
        assert record["completion"] == [record["draft"], *used][-1] and len(record["trace"]) == 2
    train = str(tmp_path / "one/demonstrations.jsonl")
    options = [*common_options(tmp_path / "sft", 1), "--model_name_or_path", str(world / "model")]
    succeed("step1_sft.main", [*options, "--train_data", train, "--num_samples", "0"], tmp_path)


BAD = {
    "no principles": (["--constitution", "FOLDER/empty.txt"], ["empty.txt", "has no principles"]),
    "no place": (["--revision_template", "FOLDER/critique.txt"], ["--revision_template", "{critique}"]),
    "no template": (["--critique_template", "FOLDER/no.txt"], ["--critique_template", "No such file"]),
    "no room": (["--max_response_length", "400"], ["--max_response_length 400", "256 positions"]),
    "no prompts": (["--prompt_data", "FOLDER/no.jsonl"], ["no.jsonl", "No such file"]),
    "no prompt": (["--prompt_data", "FOLDER/bad.jsonl"], ["bad.jsonl:1", "'prompt'"]),
    "no rounds": (["--revision_rounds", "0"], ["--revision_rounds 0", "at least 1"]),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_one_line(world: Path, tmp_path: Path, mistake: str) -> None:
    make_prompts(world, tmp_path, 4)
    (tmp_path / "empty.txt").write_text("# Nothing.\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "p"}\n')
    more, parts = BAD[mistake]
    options = words(
        world / "model", tmp_path, "out", *(word.replace("FOLDER", str(tmp_path)) for word in more)
    )
    check_refusal("step1_sft.critique", options, parts, tmp_path, tmp_path / "out")

"""The judge: probabilities against plain transformers, two ranks, resume, and training on its output."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import step2_reward.judge.main
from common.ai_feedback.options import SHIPPED
from common.generation.generate import PlainEngine
from common.runtime.options import UserError
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from step2_reward.judge.main import answer_logprobs, letter_ids, read_judge_pairs
from tests.end_to_end.test_bad_input import check_refusal
from tests.ranks import run_stage, start_stage, succeed
from tests.stages import common as common_options

TEMPLATE = "{principle} {prompt} A: {response_a} B: {response_b} ?"


def make_pairs(world: Path, folder: Path, count: int) -> list[dict]:
    """Write pairs in every shape (labelled, soft, unlabelled, tie), a template and principles."""
    lines = (world / "preferences.jsonl").read_text().splitlines()[:count]
    records = []
    for number, pair in enumerate(map(json.loads, lines)):
        a, b = pair["chosen"], pair["rejected"]
        labels = [{}, {"preference": "B"}, {"votes": ["A", "B"]}, {"preference": 0.9}]
        sides = {"prompt": pair["prompt"], "response_a": a, "response_b": b}
        records.append(pair if number % 5 == 4 else {**sides, **labels[number % 5]})
    write_pairs(folder, records)
    (folder / "judge.txt").write_text(TEMPLATE)
    (folder / "principles.txt").write_text("Be kind.\nBe brief.\nHave apples.\n")
    return records


def write_pairs(folder: Path, records: list[dict]) -> None:
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def words(world: Path, folder: Path, output: str, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(world / "model"), "--preference_data", str(folder / "pairs.jsonl"),
        "--judge_template", str(folder / "judge.txt"), "--constitution", str(folder / "principles.txt"),
        "--output_dir", str(folder / output), "--micro_batch_size", "3", *more,
    ]  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_preferences_match_plain_transformers(world: Path, tmp_path: Path) -> None:
    records = make_pairs(world, tmp_path, 10)
    records[1] |= {"response_b_ended": False}
    records[4] |= {"chosen_ended": False, "rejected_ended": True}
    write_pairs(tmp_path, records)
    succeed("step2_reward.judge.main", words(world, tmp_path, "out"), tmp_path)
    preferences = read(tmp_path / "out/preferences.jsonl")
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")

    def log_odds(record: dict, sides: str, principle: str) -> float:
        """Log-odds of the letter A over B as the next token after the question, in fp64."""
        texts = [record[f"response_{side}"][0]["content"] for side in sides]
        content = f"{principle} Human: {record['prompt'][0]['content']} A: {texts[0]} B: {texts[1]} ?"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        logprobs = (
            model(tokenizer(text, return_tensors="pt").input_ids).logits[0, -1].double().log_softmax(-1)
        )
        a, b = tokenizer.convert_tokens_to_ids(["A", "B"])
        return (logprobs[a] - logprobs[b]).item()

    assert len(preferences) == 10 and len({record["judge"]["principle"] for record in preferences}) == 3
    for record, original in zip(preferences, records, strict=True):
        a_first = log_odds(record, "ab", record["judge"]["principle"])
        b_first = -log_odds(record, "ba", record["judge"]["principle"])
        assert record["judge"]["log_odds_a_first"] == pytest.approx(a_first, abs=2e-5)
        assert record["judge"]["log_odds_b_first"] == pytest.approx(b_first, abs=2e-5)
        expected = torch.sigmoid(torch.tensor((a_first + b_first) / 2)).item()
        assert record["preference"] == pytest.approx(expected, abs=2e-5)
        assert record["prompt"] == original["prompt"]
    flags = [
        {name: value for name, value in record.items() if name.endswith("_ended")} for record in preferences
    ]
    assert flags[1] == {"response_b_ended": False} and flags[0] == flags[2] == {}
    assert flags[4] == {"response_a_ended": False, "response_b_ended": True}
    assert [record["human"] for record in preferences] == [None, "B", "tie", "A", "A"] * 2
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["judged"], report["agreement"]["labelled"], report["agreement"]["ties"]) == (10, 8, 2)


def test_step_2_trains_on_soft_labels(world: Path, tmp_path: Path) -> None:
    """Training and evaluation loss are those of the soft labels, from the scores of an unchanged model."""
    make_pairs(world, tmp_path, 8)
    succeed("step2_reward.judge.main", words(world, tmp_path, "out"), tmp_path)
    options = [
        *common_options(tmp_path / "reward", steps=1), "--model_name_or_path", str(world / "model"),
        "--train_data", str(tmp_path / "out/preferences.jsonl"), "--learning_rate", "1e-12",
    ]  # fmt: skip
    succeed("step2_reward.main", [*options, "--eval_data", str(tmp_path / "out/preferences.jsonl")], tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "reward/metrics.jsonl").read_text().splitlines()]
    measured = {name: value for line in lines for name, value in line.items()}
    judged = read(tmp_path / "out/preferences.jsonl")
    scored = [
        {"prompt": record["prompt"], "response": record[side][0]["content"]}
        for record in judged
        for side in ("response_a", "response_b")
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in scored))
    final = tmp_path / "reward/final"
    succeed(
        "step2_reward.evaluation.score_file",
        ["--reward_model_name_or_path", str(final), "--input", str(tmp_path / "in.jsonl"),
         "--output", str(tmp_path / "scored.jsonl")],
        tmp_path,
    )  # fmt: skip
    std = json.loads((final / "config.json").read_text())["reward_std"]
    scores = np.array([record["score"] for record in read(tmp_path / "scored.jsonl")]).reshape(-1, 2) * std
    p, difference = np.array([record["preference"] for record in judged]), scores[:, 0] - scores[:, 1]
    loss = p * np.log1p(np.exp(-difference)) + (1 - p) * np.log1p(np.exp(difference))
    assert measured["eval/loss"] == pytest.approx(loss.mean(), rel=1e-4)
    assert measured["train/loss"] == pytest.approx(loss.mean(), rel=1e-4)


def test_output_is_the_same_on_two_ranks_and_after_a_resume(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Byte-identical on one rank, on two, and after a stop and a resume."""
    monkeypatch.setattr(step2_reward.judge.main, "BATCHES", 2)
    make_pairs(world, tmp_path, 60)
    succeed("step2_reward.judge.main", words(world, tmp_path, "one"), tmp_path)
    succeed("step2_reward.judge.main", words(world, tmp_path, "two"), tmp_path, ranks=2)
    stopped = words(world, tmp_path, "stopped")
    running = start_stage("step2_reward.judge.main", stopped, tmp_path)
    journal = tmp_path / "stopped/journal"
    running.wait_for(lambda: journal.exists() and journal.stat().st_size > 0)
    os.kill(running.pids[0], signal.SIGTERM)
    assert running.result().codes == [75]
    assert not (tmp_path / "stopped/preferences.jsonl").exists()
    done = journal.read_text()
    succeed("step2_reward.judge.main", stopped, tmp_path)
    assert journal.read_text().startswith(done) and len(done.splitlines()) < 20
    for name in ("preferences.jsonl", "report.json"):
        contents = {(tmp_path / folder / name).read_bytes() for folder in ("one", "two", "stopped")}
        assert len(contents) == 1
    assert len(read(tmp_path / "one/preferences.jsonl")) == 60
    (tmp_path / "principles.txt").write_text("Be rude.\n")
    refused = run_stage("step2_reward.judge.main", stopped, tmp_path)
    assert refused.codes == [2] and "(--constitution) has changed" in refused.output


def test_answers_of_several_tokens(world: Path) -> None:
    """With and without a common prefix, after questions of different lengths."""
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    questions = [[5, 6, 7], [8, 9], list(range(10, 30)), [40]]
    for answers in ([[11], [12]], [[11, 12], [11, 13]], [[11, 12, 13], [14]]):
        logprobs = answer_logprobs(PlainEngine(model), questions, answers, 3)
        for row, question in enumerate(questions):
            for column, answer in enumerate(answers):
                logits = model(torch.tensor([question + answer])).logits[0].double().log_softmax(-1)
                positions = range(len(question) - 1, len(question) + len(answer) - 1)
                expected = sum(logits[p, token].item() for p, token in zip(positions, answer, strict=True))
                assert logprobs[row, column].item() == pytest.approx(expected, abs=1e-5)


def test_letters_of_a_real_tokenizer(shared: Path) -> None:
    """The template puts a space after `Assistant:`; here one letter takes two tokens."""
    encoder = SegmentEncoder(load_tokenizer(str(shared / "models/stories260K")))
    letters = letter_ids(encoder, "stories260K")
    assert [encoder.tokenizer.convert_ids_to_tokens(ids) for ids in letters] == [["▁", "A"], ["▁B"]]
    template = encoder.tokenizer.chat_template
    encoder.tokenizer.chat_template = f"{template}{{% if add_generation_prompt %}}<think>\n{{% endif %}}"
    with pytest.raises(UserError, match="stories260K: cannot answer with a letter: .* such as <think>"):
        letter_ids(SegmentEncoder(encoder.tokenizer), "stories260K")


def test_rankings_are_split_into_pairs(tmp_path: Path) -> None:
    ranking = {"prompt": "p", "responses": ["x", "y", "z"], "ranks": [2, 1, 2]}
    (tmp_path / "r.jsonl").write_text(json.dumps(ranking))
    pairs = read_judge_pairs([str(tmp_path / "r.jsonl")], skip_bad_records=False)
    sides = [(*pair.responses.values(), pair.answer) for pair in pairs]
    assert sides == [("y", "x", "A"), ("x", "z", "tie"), ("y", "z", "A")]


BAD = {
    "no principles": (["--constitution", "FOLDER/empty.txt"], ["empty.txt", "has no principles"]),
    "no constitution": (["--constitution", "FOLDER/no.yaml"], ["--constitution", "no.yaml", "No such file"]),
    "no place": (["--judge_template", "FOLDER/bare.txt"], ["--judge_template", "bare.txt", "{response_a}"]),
    "no chat template": (
        ["--model_name_or_path", "FOLDER/base"],
        ["base", "has no chat template", "--default_chat_template"],
    ),
    "no model": (["--model_name_or_path", "FOLDER"], ["config.json is missing"]),
    "no pairs": (
        ["--preference_data", "FOLDER/empty.jsonl"],
        ["empty.jsonl", "no rows left: 0 records read"],
    ),
    "no short pairs": (
        ["--max_length", "16"],
        ["pairs.jsonl: no rows left: 4 pairs: all longer than --max_length 16"],
    ),
    "no such pairs": (["--preference_data", "FOLDER/no.jsonl"], ["no.jsonl", "No such file"]),
    "a bad pair": (["--preference_data", "FOLDER/bad.jsonl"], ["bad.jsonl:1", "'response_b' is missing"]),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_one_line(world: Path, tmp_path: Path, mistake: str) -> None:
    make_pairs(world, tmp_path, 4)
    shutil.copytree(world / "model", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink(missing_ok=True)
    settings = tmp_path / "base/tokenizer_config.json"
    content = {k: v for k, v in json.loads(settings.read_text()).items() if k != "chat_template"}
    settings.write_text(json.dumps(content))
    (tmp_path / "empty.txt").write_text("# Nothing.\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bare.txt").write_text("{prompt} {principle} A or B?")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "response_a": "x"}\n')
    more, parts = BAD[mistake]
    options = words(world, tmp_path, "out", *(word.replace("FOLDER", str(tmp_path)) for word in more))
    check_refusal("step2_reward.judge.main", options, parts, tmp_path, tmp_path / "out")


def test_a_base_model_judges_with_default_chat_template(shared: Path, tmp_path: Path) -> None:
    """With the default constitution and template. Pairs beyond its context length of 512 are dropped."""
    lines = (shared / "data/stories/preferences.jsonl").read_text().splitlines()[:4]
    long = {"prompt": "p", "response_a": "a " * 500, "response_b": "b", "preference": "A"}
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, json.dumps(long)]))
    options = [
        "--model_name_or_path", str(shared / "models/stories260K"), "--preference_data",
        str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "out"), "--default_chat_template",
    ]  # fmt: skip
    succeed("step2_reward.judge.main", options, tmp_path)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["pairs"] == 5 and report["judged"] < 5
    judged = read(tmp_path / "out/preferences.jsonl")
    principles = (SHIPPED / "constitution.yaml").read_text()
    assert len(judged) == report["judged"] and all(one["judge"]["principle"] in principles for one in judged)

"""Scores of a JSONL file: correct, complete, in order, and the same after a kill and a resume."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import step2_reward.evaluation.score_file
from common.runtime.options import UserError
from common.text.tokenizer import SegmentEncoder
from step2_reward.data import tokenize_response
from step2_reward.evaluation.score_file import check_written, describe_first_records, read_examples, token_ids
from step2_reward.options import ScoreOptions
from tests.common.text.test_chat_templates import CHATML, make_encoder
from tests.end_to_end.test_ensemble import keep_scores, make_other
from tests.end_to_end.test_launch import bash
from tests.end_to_end.test_stages import succeed
from tests.ranks import Result, run_stage, start_stage
from tests.stages import ppo
from tests.word_encoder import EOS, WordEncoder


def make_input(world: Path, path: Path, count: int) -> list[dict]:
    """Write records in every shape, with an extra field."""
    pairs = [json.loads(line) for line in (world / "preferences.jsonl").read_text().splitlines()[:count]]
    records = []
    for number, pair in enumerate(pairs):
        prompt, answer = pair["prompt"], pair["chosen"]
        shapes = [
            {"messages": prompt + answer},
            {"prompt": prompt, "completion": answer},
            {"prompt": prompt, "response": answer[0]["content"], "score": "to be replaced"},
        ]
        records.append({"id": f"é{number}", **shapes[number % 3]})
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return records


def words(models: list[Path], folder: Path, output: str, *more: str) -> list[str]:
    return [
        "--reward_model_name_or_path", *map(str, models), "--input", str(folder / "in.jsonl"),
        "--output", str(folder / output), "--micro_batch_size", "3", *more,
    ]  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(result: Result, *parts: str) -> None:
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert result.codes == [2] and len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(part in lines[0] for part in parts), lines


def test_scores_match_plain_transformers(world: Path, run: Path, tmp_path: Path) -> None:
    """Centred scores of an ensemble through the launch script; every record has all its fields."""
    models = [run / "reward/final", make_other(tmp_path / "other", run / "reward/final")]
    records = make_input(world, tmp_path / "in.jsonl", 9)
    combined = ["--reward_combine", "mean_std", "--reward_std_coef", "2"]
    done = bash("score.sh", words(models, tmp_path, "out.jsonl", *combined), tmp_path)
    assert done.returncode == 0, done.stdout
    expected = []
    for folder in models:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        row = []
        for record in records:
            answer = record.get("completion") or [{"role": "assistant", "content": record.get("response")}]
            *prompt, answer = record.get("messages") or record["prompt"] + answer
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            ids = (
                tokenizer(prompt).input_ids + tokenizer(answer["content"], add_special_tokens=False).input_ids
            )
            ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
            row.append(model(ids).logits.item())
        expected.append((torch.tensor(row) - model.config.reward_mean) / model.config.reward_std)
    a, b = expected
    for number, (scored, record) in enumerate(zip(read(tmp_path / "out.jsonl"), records, strict=True)):
        score, scores = scored.pop("score"), scored.pop("scores")
        record.pop("score", None)
        assert scored == record
        assert scores == pytest.approx([a[number].item(), b[number].item()], abs=1e-5)
        assert score == pytest.approx(((a + b) / 2 - (a - b).abs())[number].item(), abs=2e-5)


def test_scores_match_those_of_step_3(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The text of a rollout's responses gets the scores of PPO."""
    keep_scores(monkeypatch)
    model = make_other(tmp_path / "other", run / "reward/final")
    succeed("step3_ppo.main", ppo(world, run / "sft/final", model, tmp_path / "ppo", steps=1), tmp_path)
    rollout = torch.load(tmp_path / "ppo/scores.pt")
    rows = [row for row, text in enumerate(rollout["texts"]) if text.strip()]
    assert len(rows) > 10
    records = [{"prompt": rollout["prompts"][row], "response": rollout["texts"][row].strip()} for row in rows]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    succeed("step2_reward.evaluation.score_file", words([model], tmp_path, "out.jsonl"), tmp_path)
    scores = [record["score"] for record in read(tmp_path / "out.jsonl")]
    assert scores == pytest.approx([rollout["scores"][row].item() for row in rows], abs=1e-5)


def test_a_killed_run_ends_with_the_same_bytes(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Killed during scoring; then truncated within a line, after a line and after a window."""
    monkeypatch.setattr(step2_reward.evaluation.score_file, "WINDOW", 8)
    models, out = [run / "reward/final"], tmp_path / "out.jsonl"
    make_input(world, tmp_path / "in.jsonl", 200)
    good = (tmp_path / "in.jsonl").read_text().splitlines()
    good.insert(11, '{"prompt": "Hello!"}')  # a bad record has no line in the output
    (tmp_path / "in.jsonl").write_text("\n".join(good))
    options = words(models, tmp_path, "out.jsonl", "--skip_bad_records")
    running = start_stage("step2_reward.evaluation.score_file", options, tmp_path)
    running.wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 16)
    os.kill(running.pids[0], signal.SIGKILL)
    assert running.result().codes == [-signal.SIGKILL]
    assert out.read_bytes().count(b"\n") < 200
    succeed("step2_reward.evaluation.score_file", options, tmp_path)
    expected = out.read_bytes()
    ends = [index + 1 for index, byte in enumerate(expected) if byte == ord("\n")]
    assert len(ends) == 200 and [record["id"] for record in read(out)] == [f"é{n}" for n in range(200)]
    for cut in (ends[15], ends[15] + 9, ends[20]):
        out.write_bytes(expected[:cut])
        succeed("step2_reward.evaluation.score_file", options, tmp_path)
        assert out.read_bytes() == expected, cut


def test_a_stop_ends_after_a_window(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step2_reward.evaluation.score_file, "WINDOW", 8)
    make_input(world, tmp_path / "in.jsonl", 400)
    out = tmp_path / "out.jsonl"
    running = start_stage(
        "step2_reward.evaluation.score_file", words([run / "reward/final"], tmp_path, "out.jsonl"), tmp_path
    )
    running.wait_for(lambda: out.exists() and out.stat().st_size > 0)
    os.kill(running.pids[0], signal.SIGTERM)
    result = running.result()
    done = len(read(out))
    assert result.codes == [75] and done % 8 == 0 and 0 < done < 400
    last = f"Stopped; {done} records scored, saved in {out}. Run the same command to resume."
    assert result.output.splitlines()[-1] == last


def test_without_records_no_output_is_left(run: Path, tmp_path: Path) -> None:
    for lines, *parts in (
        ("", "no rows left: 0 records read"),
        ('{"prompt": 3}\n[]\n', "no rows left: 2 records read: 2 bad, the first at", "in.jsonl:1"),
    ):
        (tmp_path / "in.jsonl").write_text(lines)
        options = words([run / "reward/final"], tmp_path, "out.jsonl", "--skip_bad_records")
        refused(run_stage("step2_reward.evaluation.score_file", options, tmp_path), *parts)
        assert not (tmp_path / "out.jsonl").exists()


def test_the_output_of_other_models_is_refused(world: Path, run: Path, tmp_path: Path) -> None:
    """It stays unchanged. Another batch size is accepted."""
    one, two = run / "reward/final", make_other(tmp_path / "other", run / "reward/final")
    make_input(world, tmp_path / "in.jsonl", 12)
    succeed("step2_reward.evaluation.score_file", words([one], tmp_path, "out.jsonl"), tmp_path)
    before = (tmp_path / "out.jsonl").read_bytes()
    refused(
        run_stage("step2_reward.evaluation.score_file", words([two], tmp_path, "out.jsonl"), tmp_path),
        "--output", "out.jsonl", "other scores than those of these models",
    )  # fmt: skip
    assert (tmp_path / "out.jsonl").read_bytes() == before
    other_batches = [*words([one], tmp_path, "out.jsonl"), "--micro_batch_size", "5"]
    succeed("step2_reward.evaluation.score_file", other_batches, tmp_path)
    assert len(read(tmp_path / "out.jsonl")) == 12


@pytest.mark.parametrize(
    ("written", "fits"),
    [
        ([], True),
        (['{"id": 1, "score": 0.5}'], True),
        (['{"id": 1, "score": 0.51}', '{"id": 2, "score": -3.1}'], True),
        (['{"id": 1, "score": 0.5}', '{"id": 2, "score": -3.3}'], False),  # by other models
        (['{"id": 2, "score": 0.5}'], False),  # of another record
        (['{"id": 1}'], False),
        (['{"id": 1, "score": 0.5}', "nothing"], False),
        (
            ['{"id": 1, "score": 0.5}', '{"id": 2, "score": -3}', '{"id": 3, "score": 0}'],
            False,
        ),  # more records
    ],
)
def test_existing_lines_must_match(written: list[str], fits: bool) -> None:
    lines = [b'{"id": 1, "score": 0.5}\n', b'{"id": 2, "score": -3.0}\n']
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="--output F.jsonl"):
        check_written([f"{line}\n".encode() for line in written], lines, ScoreOptions(output="F.jsonl"))


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not valid JSON"),
        ('{"prompt": "Hello!"}', "'response'"),
        ('{"prompt": "Hello!", "response": ""}', "is empty"),
        ('{"prompt": "Hello!", "response": "a b c d e f g h"}', "response too long for --max_length 8"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "'messages'"),
        (
            json.dumps({"messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "user")]}),
            "must end with an assistant message",
        ),
    ],
)
def test_a_bad_record_is_named_or_skipped(tmp_path: Path, line: str, part: str) -> None:
    good = '{"prompt": "a b", "response": "c"}'
    (tmp_path / "in.jsonl").write_text(f"\n{line}\n{good}\n{good}\n")
    options = ScoreOptions(input=str(tmp_path / "in.jsonl"), max_length=8)
    encoder = WordEncoder()
    encoder.bos = []
    with pytest.raises(UserError, match=f"in.jsonl:2: .*{part}"):
        list(read_examples(options, [encoder], 0))
    expected = (json.loads(good), {encoder: [10, 11, 12, EOS]})
    options.skip_bad_records = True
    assert list(read_examples(options, [encoder], 0)) == [expected] * 2
    assert list(read_examples(options, [encoder], 1)) == [expected]


def test_a_weight_selects_or_repeats_records_also_after_a_resume(tmp_path: Path) -> None:
    file, encoder = tmp_path / "in.jsonl", WordEncoder()
    file.write_text("".join(f'{{"prompt": "p{n}", "response": "c"}}\n' for n in range(40)))

    def prompts(weight: str, done: int) -> list[str]:
        options = ScoreOptions(input=f"{file}{weight}", max_length=64)
        return [record["prompt"] for record, _ in read_examples(options, [encoder], done)]

    part = prompts(":0.3", 0)
    assert 5 < len(part) < 20 and prompts(":0.3", 4) == part[4:]
    assert prompts(":2", 3) == ["p1", *[f"p{n}" for n in range(2, 40) for _ in range(2)]]
    file.write_text('{"prompt": "p", "response": "c"}\n')
    with pytest.raises(UserError, match="no rows left: 1 records read: 1 left out by the weight"):
        prompts(":0.0001", 0)


def test_many_skipped_records_or_truncated_prompts_are_a_warning(tmp_path: Path, capsys) -> None:
    lines = ['{"prompt": "a b c d e f g h", "response": "c"}', "[]", '{"prompt": "a", "response": "c"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    encoder = WordEncoder()
    encoder.bos = []
    options = ScoreOptions(input=str(tmp_path / "in.jsonl"), max_length=8, skip_bad_records=True)
    assert len(list(read_examples(options, [encoder], 0))) == 2
    out = capsys.readouterr().out
    assert "warning: 33% of the records are left out" in out
    assert "warning: 33% of the prompts are truncated to --max_length 8" in out


def test_rendering_of_the_first_records_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    turns = [{"role": "user", "content": "q"}]
    records = [{"prompt": turns, "response": "A plum."}, *[{"prompt": "Q:", "completion": " A pear."}] * 2]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    tokenizer = make_encoder(CHATML, "<|im_end|>").tokenizer
    tokenizer.name_or_path = "some/model"
    encoder, options = SegmentEncoder(tokenizer), ScoreOptions(input=str(file), max_length=512)
    describe_first_records(options, [*read_examples(options, [encoder], 0)], 0, encoder)
    printed = capsys.readouterr().out
    assert "1 prompts rendered with the chat template of some/model, 2 prompts used verbatim" in printed
    assert "warning: 2 prompts are strings" in printed
    describe_first_records(options, [*read_examples(options, [encoder], 1)], 1, encoder)
    assert "in.jsonl, records 2 to 3: 2 prompts used verbatim" in capsys.readouterr().out


def test_a_truncated_response_is_scored_as_in_step_3() -> None:
    encoder, ended = WordEncoder(), {"prompt": "a b", "completion": "c d"}
    truncated = ended | {"ended": False}
    expected, _ = token_ids(ended, encoder, 16)
    assert expected[-1] == EOS
    assert token_ids(truncated, encoder, 16)[0] == expected
    assert tokenize_response(truncated, encoder, 16, "drop")[0].ids == expected

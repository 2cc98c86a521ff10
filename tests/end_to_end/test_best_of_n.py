"""Rejection sampling: files do not depend on ranks or stops, and steps 1 and 2 can train on them."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from common.data.records import fraction
from tests.end_to_end.test_bad_input import check_refusal
from tests.end_to_end.test_failures import STOPPED
from tests.end_to_end.test_launch import LAUNCH, bash
from tests.ranks import run_stage, start_stage, succeed
from tests.stages import (
    ZERO,
    reward,
    sft,
)

MODULE = "step3_ppo.best_of_n.main"
FILES = ("samples.jsonl", "demonstrations.jsonl", "preferences.jsonl", "report.json")
FUNCTIONS = """
def letters(prompts, responses, records):
    return [float(sum(map(str.isalpha, text))) for text in responses]

def one(prompts, responses, records):
    return [1.0] * len(responses)
"""


def options(world: Path, run: Path, output: Path, *words: str) -> list[str]:
    """Three responses to each of 25 prompts, in chunks of four prompts."""
    return [
        "--model_name_or_path", str(run / "sft/final"), "--prompt_data", str(world / "prompts.jsonl"),
        "--reward_model_name_or_path", str(run / "reward/final"), "--output_dir", str(output),
        "--samples_per_prompt", "3", "--prompts_per_round", "25", "--generation_batch_size", "12",
        "--max_response_length", "8", "--keep_truncated", *words,
    ]  # fmt: skip


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_scores(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in one.items() if k not in ("score", "scores", "margin")} for one in records(path)]


def rules(folder: Path) -> Path:
    (folder / "rules.py").write_text(FUNCTIONS)
    return folder / "rules.py"


@pytest.fixture(scope="module")
def done(world: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of one uninterrupted rank."""
    folder = tmp_path_factory.mktemp("best_of_n")
    succeed(MODULE, options(world, run, folder), folder)
    return folder


def test_samples_and_selection(done: Path) -> None:
    """Three responses to each training prompt; the best is a demonstration, best and worst are a pair."""
    samples, report = records(done / "samples.jsonl"), json.loads((done / "report.json").read_text())
    assert [one["group"] for one in samples] == [row // 3 for row in range(75)]
    assert min(fraction(one["prompt"], "") for one in samples) >= 0.1
    assert len({json.dumps(one["prompt"]) for one in samples}) == 25
    demonstrations, preferences = [], []
    for start in range(0, 75, 3):
        group = [one for one in samples[start : start + 3] if one["completion"]]
        ordered = sorted(group, key=lambda one: -one["score"])
        top, last = ordered[0], ordered[-1]
        demonstrations.append({name: top[name] for name in ("prompt", "completion", "ended", "score")})
        if top["score"] > last["score"]:
            margin = pytest.approx(top["score"] - last["score"], abs=1e-6)
            texts = {"chosen": top["completion"], "rejected": last["completion"]}
            ends = {"chosen_ended": top["ended"], "rejected_ended": last["ended"]}
            preferences.append({"prompt": top["prompt"], **texts, **ends, "margin": margin})
    assert records(done / "demonstrations.jsonl") == demonstrations
    assert records(done / "preferences.jsonl") == preferences and len(preferences) > 20
    assert report["response_tokens"] == sum(one["length"] for one in samples)
    assert report["score"]["mean"] == pytest.approx(np.mean([one["score"] for one in samples]))


def test_two_ranks_equal_one(world: Path, run: Path, done: Path, tmp_path: Path) -> None:
    """With partitioned weights, and with chunks that do not divide the number of prompts."""
    words = ["--generation_batch_size", "7", "--zero_config", str(ZERO / "zero3.json")]
    succeed(MODULE, options(world, run, tmp_path, *words), tmp_path, ranks=2)
    for name in FILES[:3]:
        assert without_scores(tmp_path / name) == without_scores(done / name)
    scores, expected = ([one["score"] for one in records(folder / FILES[0])] for folder in (tmp_path, done))
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_each_round_has_its_own_prompts_and_responses(world: Path, run: Path, tmp_path: Path) -> None:
    lines = list(dict.fromkeys((world / "prompts.jsonl").read_text().splitlines()[:60]))
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    words = ["--prompt_data", str(tmp_path / "few.jsonl"), "--eval_fraction", "0"]
    words += ["--reward_function", f"{rules(tmp_path)}:letters:2", f"{rules(tmp_path)}:one:-1"]
    rounds = []
    for name, more in {
        "1": ["--prompts_per_round", "5"], "2": ["--prompts_per_round", "5", "--round", "2"],
        "all": ["--prompts_per_round", "0"], "again": ["--prompts_per_round", "0", "--round", "2"],
    }.items():  # fmt: skip
        succeed(MODULE, options(world, run, tmp_path / name, *words, *more), tmp_path)
        rounds.append(records(tmp_path / name / "samples.jsonl"))
    one, two, complete, again = ({json.dumps(sample["prompt"]) for sample in samples} for samples in rounds)
    assert len(one) == len(two) == 5 and not one & two
    assert complete == again == {json.dumps(json.loads(line)["prompt"]) for line in lines}
    pairs = list(zip(rounds[2], rounds[3], strict=True))
    assert sum(a["completion"] == b["completion"] for a, b in pairs) < len(pairs) / 4
    for sample in rounds[0]:
        parts = sample["scores"]
        assert list(parts) == ["reward_model_1", "letters", "one"] and parts["one"] == 1
        assert sample["score"] == pytest.approx(parts["reward_model_1"] + 2 * parts["letters"] - 1, abs=1e-4)
        assert parts["letters"] >= sum(map(str.isalpha, sample["completion"]))  # that is without outer space


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_resumed_round_writes_the_same_files(
    world: Path, run: Path, done: Path, tmp_path: Path, number: int
) -> None:  # fmt: skip
    """After a graceful stop, or a kill in the middle of a line."""
    output, words = tmp_path / "out", options(world, run, tmp_path / "out")
    running = start_stage(MODULE, words, tmp_path)
    running.wait_for(lambda: (output / FILES[0]).exists() and (output / FILES[0]).stat().st_size > 0)
    os.kill(running.pids[0], number)
    result = running.result()
    assert result.codes == [STOPPED if number == signal.SIGTERM else -number], result.output
    written = (output / FILES[0]).read_bytes()
    complete = (done / FILES[0]).read_bytes()
    assert 0 < len(written) < len(complete) and complete.startswith(written)
    if number == signal.SIGKILL:
        (output / FILES[0]).write_bytes(complete[: len(written) + 500])
    succeed(MODULE, words, tmp_path)
    for name in FILES:
        assert (output / name).read_bytes() == (done / name).read_bytes()


def test_selection_can_be_repeated(world: Path, run: Path, done: Path, tmp_path: Path) -> None:
    """Nothing is sampled again; --quantile selects its share; other sampling options are refused."""
    before = {name: (done / name).read_bytes() for name in FILES}
    choice = ["--selection_dir", str(tmp_path / "choice"), "--keep", "quantile", "--quantile", "0.75"]
    result = run_stage(MODULE, options(world, run, done, *choice, "--pairs", "none"), tmp_path)
    assert (
        result.codes == [0] and "25 of 25 prompts done" in result.output and "tokens/s" not in result.output
    )
    samples = [one for one in records(done / FILES[0]) if one["completion"]]
    limit = sorted(one["score"] for one in samples)[int(0.75 * len(samples)) - 1]
    scores = [one["score"] for one in samples if one["score"] > limit]
    assert [one["score"] for one in records(tmp_path / "choice/demonstrations.jsonl")] == scores
    assert abs(len(scores) - len(samples) / 4) <= 1 and not records(tmp_path / "choice/preferences.jsonl")
    limit = json.loads((tmp_path / "choice/report.json").read_text())["threshold"]
    words = ["--selection_dir", str(tmp_path / "same"), "--keep", "threshold", "--threshold", str(limit)]
    succeed(MODULE, options(world, run, done, *words), tmp_path)
    files = [tmp_path / folder / "demonstrations.jsonl" for folder in ("choice", "same")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for words, part in (
        (["--temperature", "0.7"], "--temperature 1.0 -> 0.7"),
        (["--round", "2"], "--round 1 -> 2"),
        (["--model_name_or_path", str(world / "model")], "model (--model_name_or_path) has changed"),
    ):
        check_refusal(MODULE, options(world, run, done, *words), [str(done), part], tmp_path, done)
    assert {name: (done / name).read_bytes() for name in FILES} == before


def test_steps_1_and_2_train_on_the_files(world: Path, run: Path, done: Path, tmp_path: Path) -> None:
    words = sft(world, tmp_path / "sft", 1)
    succeed("step1_sft.main", [*words, "--train_data", str(done / "demonstrations.jsonl")], tmp_path)
    words = reward(world, run / "sft/final", tmp_path / "reward", 1)
    words += ["--train_data", str(done / "preferences.jsonl"), "--use_margin"]
    succeed("step2_reward.main", words, tmp_path)
    assert "25 demonstrations" in next(tmp_path.glob("step1*.log")).read_text()


def test_mistakes_are_one_line(world: Path, run: Path, done: Path, tmp_path: Path) -> None:
    without = [word for word in options(world, run, tmp_path / "out") if word != "--keep_truncated"]
    index = without.index("--reward_model_name_or_path")
    for words, parts in (
        (without[:index] + without[index + 2 :], ["--process_model_name_or_path is required"]),
        ([*without, "--quantile", "0.9"], ["--quantile 0.9", "--keep best"]),
        ([*without, "--samples_per_prompt", "0"], ["--samples_per_prompt 0", "at least 1"]),
        ([*without, "--max_response_length", "400"], ["--max_response_length 400", "256 positions"]),
    ):
        check_refusal(MODULE, words, parts, tmp_path, tmp_path / "out")
    choice = ["--selection_dir", str(tmp_path / "out")]
    for words, parts in (
        (options(world, run, done, "--keep", "threshold", "--threshold", "1000"), ["--threshold 1000"]),
        (
            [*without, "--output_dir", str(tmp_path / "short"), "--max_response_length", "1"],
            [
                "samples.jsonl: none of the 75 responses is usable",
                "cut at 1 tokens",
                "pass --keep_truncated, or raise --max_response_length in another --output_dir",
            ],
        ),
    ):
        result = run_stage(MODULE, [*words, *choice], tmp_path)
        assert result.codes == [2], result.output
        (error,) = [line for line in result.output.splitlines() if line.startswith("error:")]
        assert all(part in error for part in parts), error
        assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("script", "variable", "words", "part"),
    [
        (
            "iterative_dpo.sh",
            "DIRECT_OPTIONS",
            "--loss orpo",
            "launch/step2_direct.sh: --reference_model_name",
        ),
        (
            "raft.sh",
            "STEP1_OPTIONS",
            "--learning_rat 1",
            "launch/step1_sft.sh: unknown option --learning_rat",
        ),
        (
            "rest.sh",
            "EVALUATE_OPTIONS",
            "--best_of -1",
            "launch/evaluate_ppo.sh: --best_of -1: must be at least",
        ),
    ],
)
def test_options_of_later_commands_are_refused_before_sampling(
    world: Path, run: Path, tmp_path: Path, script: str, variable: str, words: str, part: str
) -> None:  # fmt: skip
    given = options(world, run, tmp_path)
    variables = {"MODEL": given[1], "PROMPTS": given[3], "OUTPUT": str(tmp_path / "out"), variable: words}
    result = bash(script, given[4:6], tmp_path, **variables)
    assert result.returncode == 2 and not (tmp_path / "out").exists(), result.stdout
    assert f"error: {part}" in result.stdout


@pytest.mark.rare
def test_raft_resumes_after_a_stop(world: Path, run: Path, tmp_path: Path) -> None:
    """Two rounds through the script, stopped in the first one: a model, and a report on both rounds."""
    output = tmp_path / "out"
    given = options(world, run, output)
    variables = {
        "MODEL": given[1], "PROMPTS": given[3], "OUTPUT": str(output), "ROUNDS": "2", "NUM_GPUS": "1",
        "SAMPLE_OPTIONS": "--prompts_per_round 25 --samples_per_prompt 3 --keep_truncated",
        "STEP1_OPTIONS": "--max_steps 2 --global_batch_size 4 --learning_rate 1e-3",
        "EVALUATE_OPTIONS": "--max_eval_samples 8",
    }  # fmt: skip
    words = [*given[4:6], "--max_response_length", "8"]
    script = ["bash", str(LAUNCH / "raft.sh"), *words]
    with subprocess.Popen(script, env={**os.environ, **variables}, stdout=subprocess.PIPE) as running:
        while not (output / "round_1/samples/train.log").exists():
            assert running.poll() is None, running.stdout.read()
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        log = running.stdout.read()
    assert running.returncode == STOPPED and not (output / "final").exists(), log
    done = bash("raft.sh", words, tmp_path, **variables)
    assert done.returncode == 0, done.stdout
    assert (output / "final").resolve() == (output / "round_2/step1_sft/final").resolve()
    AutoModelForCausalLM.from_pretrained(output / "final")
    options_of = [json.loads((output / f"round_{n}/step1_sft/options.json").read_text()) for n in (1, 2)]
    starts = [given[1], f"{output}/round_1/step1_sft/final"]
    assert [one["model_name_or_path"] for one in options_of] == starts
    policies = json.loads((output / "report/report.json").read_text())["policies"]
    assert [one["model"] for one in policies] == [*starts, f"{output}/round_2/step1_sft/final"]
    assert all(abs(one["kl"]["mean"]) > 0 for one in policies[1:])
    assert all("distinct_2" in one for one in policies)

"""Process reward models: from labelled steps through the launch script to best of n and PPO."""

import json
import os
import random
import shutil
import signal
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.chains import as_preference, as_steps, build_model, compared, make_question, write_jsonl
from tests.end_to_end.test_launch import bash
from tests.end_to_end.test_resume import STOPPED, assert_same_end, steps_of, zero_config
from tests.ranks import run_stage, start_stage, succeed
from tests.stages import LORA, ZERO, common, metrics, ppo, timeless

PROCESS, BEST, PPO = "step2_reward.process.main", "step3_ppo.best_of_n.main", "step3_ppo.main"


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, an untrained policy, a process model made by the launch script and an outcome model."""
    folder = tmp_path_factory.mktemp("chains")
    draw = random.Random(0)
    records = [*compared(draw, 60, 3, 0.3)]
    write_jsonl(folder / "steps.jsonl", [one for record in records for one in as_steps(record)])
    write_jsonl(folder / "preferences.jsonl", map(as_preference, records))
    write_jsonl(folder / "prompts.jsonl", [{"prompt": make_question(draw, 3)} for _ in range(80)])
    build_model(folder / "model", hidden_size=32, layers=2, heads=4)
    done = bash("step2_process.sh", training(folder, folder / "process"), folder, NUM_GPUS="2")
    assert done.returncode == 0, done.stdout
    words = ["--model_name_or_path", str(folder / "model"), "--learning_rate", "1e-2"]
    words += ["--train_data", str(folder / "preferences.jsonl")]
    succeed("step2_reward.main", [*common(folder / "reward", 3), *words], folder)
    return folder


def training(chains: Path, output: Path, steps: int = 12) -> list[str]:
    return [
        *common(output, steps), "--model_name_or_path", str(chains / "model"), "--learning_rate", "1e-2",
        "--train_data", str(chains / "steps.jsonl"), "--best_metric", "eval/first_error",
    ]  # fmt: skip


def sampling(chains: Path, output: Path) -> list[str]:
    return [
        "--model_name_or_path", str(chains / "model"), "--prompt_data", str(chains / "prompts.jsonl"),
        "--process_model_name_or_path", str(chains / "process/final"), "--output_dir", str(output),
        "--samples_per_prompt", "4", "--prompts_per_round", "16", "--max_response_length", "12",
        "--keep_truncated",
    ]  # fmt: skip


def optimisation(chains: Path, output: Path, *words: str, steps: int = 2) -> list[str]:
    """PPO by steps alone."""
    full = ppo(chains, chains / "model", chains / "reward/final", output, steps)
    place = full.index("--reward_model_name_or_path")
    del full[place : place + 2]
    path = str(chains / "process/final")
    return [*full, "--process_model_name_or_path", path, "--max_response_length", "12", *words]


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def plain_probabilities(chains: Path, sample: dict[str, Any]) -> list[float]:
    """Of each step, by transformers alone. Every character is a token."""
    folder = chains / "process/final"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    prompt, reply = (tokenizer(sample[name]).input_ids for name in ("prompt", "completion"))
    ids = [*prompt, *reply, tokenizer.eos_token_id]
    with torch.no_grad():
        scores = model.score(model.model(torch.tensor([ids]))[0])[0, :, 0].sigmoid().tolist()
    newline = tokenizer("\n").input_ids[0]
    steps, begin = [], len(prompt)
    for place in range(len(prompt), len(ids)):
        if place == len(ids) - 1 and begin < place or ids[place] == newline and begin < place:
            steps.append(scores[place])
        begin = place + 1 if ids[place] == newline else begin
    return steps or scores[-1:]


def test_training_learns_and_marks_the_model(chains: Path) -> None:
    config = json.loads((chains / "process/final/config.json").read_text())
    assert config["step_separator"] == "\n" and (chains / "process/best/config.json").exists()
    losses, accuracies = (metrics(chains / "process", f"eval/{name}") for name in ("loss", "accuracy"))
    assert len(losses) == 2 and losses[1] < losses[0]
    assert accuracies[1] >= 0.5 and metrics(chains / "process", "eval/right_share")[0] > 0.5


def test_samples_are_scored_step_by_step(chains: Path, tmp_path: Path) -> None:
    """Alone and beside an outcome model, by every aggregation, on one rank and on two at ZeRO 3."""
    succeed(BEST, sampling(chains, tmp_path / "one"), tmp_path)
    one = samples(tmp_path / "one")
    assert sum(len(sample["steps"]) > 1 for sample in one) > 3
    complete = [one for one in one if len(one["completion"]) + one["ended"] == one["length"]]
    assert len(complete) > 20  # without <pad>, which no text shows
    for sample in complete[:20]:
        assert sample["steps"] == pytest.approx(plain_probabilities(chains, sample), abs=1e-5)
    for sample in one:
        assert sample["score"] == pytest.approx(sum(map(log, sample["steps"])), rel=1e-3, abs=1e-4)
    words = ["--process_aggregation", "min", "--process_weight", "0.5", "--zero_config"]
    words += [str(ZERO / "zero3.json"), "--reward_model_name_or_path", str(chains / "reward/final")]
    succeed(BEST, [*sampling(chains, tmp_path / "two"), *words], tmp_path, ranks=2)
    for sample, other in zip(one, samples(tmp_path / "two"), strict=True):
        assert other["completion"] == sample["completion"]
        assert other["steps"] == pytest.approx(sample["steps"], abs=1e-5)
        parts = other["scores"]
        assert parts["process"] == pytest.approx(log(min(sample["steps"])), rel=1e-3, abs=1e-4)
        assert other["score"] == pytest.approx(parts["reward_model_1"] + 0.5 * parts["process"], abs=1e-5)


def test_ppo_by_steps_on_one_and_two_ranks(chains: Path, tmp_path: Path) -> None:
    """The score is the sum of log-probabilities; the critic is new; two ranks equal one."""
    one, two = tmp_path / "one", tmp_path / "two"
    succeed(PPO, optimisation(chains, one), tmp_path)
    assert metrics(one, "reward/mean")[0] < 0 and not metrics(one, "reward/mean_process")
    lowest, mean, steps = (metrics(one, f"process/{name}")[0] for name in ("min", "mean", "steps"))
    assert 0 < lowest <= mean < 1 <= steps
    assert metrics(one, "policy/ratio") == pytest.approx([1.0] * 2, abs=1e-5)
    words = ["--zero_config", str(ZERO / "zero3.json"), "--micro_batch_tokens", "100"]
    succeed(PPO, optimisation(chains, two, *words), tmp_path, ranks=2)
    for name in ("reward/mean", "process/min", "kl/mean", "policy/approx_kl", "value/loss"):
        assert metrics(two, name) == pytest.approx(metrics(one, name), rel=2e-3, abs=1e-5)


def test_step_scores_are_added_to_those_of_other_rewards(chains: Path, tmp_path: Path) -> None:
    """With an outcome model, adapters and groups: the mean score is the weighted sum of the parts."""
    words = ["--reward_model_name_or_path", str(chains / "reward/final"), "--process_weight", "0.25", *LORA]
    words += ["--advantage_estimator", "group", "--samples_per_prompt", "4", "--max_redraws", "1"]
    succeed(PPO, optimisation(chains, tmp_path / "out", *words), tmp_path)
    score, outcome, steps = (
        metrics(tmp_path / "out", f"reward/{name}") for name in ("mean", "mean_1", "mean_process")
    )
    assert score == pytest.approx([a + 0.25 * b for a, b in zip(outcome, steps, strict=True)], rel=1e-4)


def refusal(module: str, words: list[str], folder: Path) -> str:
    result = run_stage(module, words, folder)
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert result.codes == [2] and len(lines) == 1, result.output
    return lines[0]


def test_wrong_kinds_of_models_are_refused(chains: Path, tmp_path: Path) -> None:
    """An outcome model in place of a process model, the other way round, and other tokenizers."""
    outcome, process = chains / "reward/final", chains / "process/final"
    words = ["--process_model_name_or_path", str(outcome)]
    for module, options in ((PPO, optimisation), (BEST, sampling)):
        line = refusal(module, [*options(chains, tmp_path / "out"), *words], tmp_path)
        assert f"--process_model_name_or_path {outcome}: a reward model of whole responses" in line
    for module, name, options in (
        (PPO, "reward_model_name_or_path", optimisation), (PPO, "gold_reward_model", optimisation),
        (BEST, "reward_model_name_or_path", sampling),
    ):  # fmt: skip
        line = refusal(module, [*options(chains, tmp_path / "out"), f"--{name}", str(process)], tmp_path)
        assert f"--{name} {process}: a process reward model, which scores steps" in line
    line = refusal("step2_reward.main", [
        *common(tmp_path / "out", 1), "--model_name_or_path", str(process),
        "--train_data", str(chains / "preferences.jsonl"),
    ], tmp_path)  # fmt: skip
    assert "a process reward model, which scores steps" in line
    other = shutil.copytree(process, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(other)
    words = ["--process_model_name_or_path", str(other)]
    line = refusal(PPO, [*optimisation(chains, tmp_path / "out"), *words], tmp_path)
    assert f"{other}: has another tokenizer than the policy" in line
    words = ["--max_prompt_length", "60", "--max_response_length", "100"]
    config = json.loads((process / "config.json").read_text()) | {"max_position_embeddings": 64}
    short = shutil.copytree(process, tmp_path / "short")
    (short / "config.json").write_text(json.dumps(config))
    words = ["--process_model_name_or_path", str(short), "--max_response_length", "40"]
    line = refusal(BEST, [*sampling(chains, tmp_path / "out"), *words], tmp_path)
    assert "its context length is 64 tokens; --max_prompt_length and --max_response_length together" in line


def test_training_continues_from_a_process_model_and_from_an_outcome_model(
    chains: Path, tmp_path: Path
) -> None:
    for name in ("process", "reward"):
        words = ["--model_name_or_path", str(chains / name / "final"), "--eval_steps", "1"]
        succeed(PROCESS, [*training(chains, tmp_path / name, 1), *words], tmp_path)
    assert metrics(tmp_path / "process", "eval/loss")[0] == pytest.approx(
        metrics(chains / "process", "eval/loss")[-1], rel=1e-4
    )
    config = json.loads((tmp_path / "reward/final/config.json").read_text())
    assert (config["reward_mean"], config["reward_std"], config["step_separator"]) == (0.0, 1.0, "\n")


@pytest.mark.rare
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("zero", "adapters"), [*product((0, 1, 2, 3), (False, True))])
def test_a_stopped_process_model_resumes_to_the_same_bytes(
    chains: Path, tmp_path: Path, zero: int, adapters: bool, ranks: int
) -> None:
    """At each ZeRO stage, also with adapters; the losses are those of ZeRO 0 on two ranks."""
    full, parts = tmp_path / "full", tmp_path / "parts"
    extra = [*zero_config(tmp_path, zero), *LORA * adapters, "--save_steps", "1", "--best_metric", "none"]
    succeed(PROCESS, [*training(chains, full, 6), *extra], tmp_path, ranks)
    running = start_stage(PROCESS, [*training(chains, parts, 6), *extra], tmp_path, ranks)
    running.wait_for(lambda: (parts / "metrics.jsonl").exists() and 1 in steps_of(parts))
    os.kill(running.pids[-1], signal.SIGTERM)
    stopped = running.result()
    assert stopped.codes == [STOPPED] * ranks, stopped.output
    succeed(PROCESS, [*training(chains, parts, 6), *extra], tmp_path, ranks)
    assert_same_end(full, parts)
    if not adapters:
        expected = metrics(chains / "process", "train/loss")[:1]
        assert metrics(full, "train/loss")[:1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("zero", "adapters", "ranks"), [(0, True, 1), (2, False, 2), (3, False, 2), (3, True, 1)]
)
def test_stopped_ppo_by_steps_resumes_to_the_same_bytes(
    chains: Path, tmp_path: Path, zero: int, adapters: bool, ranks: int
) -> None:
    full, parts = tmp_path / "full", tmp_path / "parts"
    extra = [*zero_config(tmp_path, zero), *LORA * adapters, "--save_steps", "1"]
    succeed(PPO, optimisation(chains, full, *extra, steps=3), tmp_path, ranks)
    running = start_stage(PPO, optimisation(chains, parts, *extra, steps=3), tmp_path, ranks)
    running.wait_for(lambda: (parts / "metrics.jsonl").exists() and 1 in steps_of(parts))
    os.kill(running.pids[-1], signal.SIGTERM)
    stopped = running.result()
    assert stopped.codes == [STOPPED] * ranks, stopped.output
    succeed(PPO, optimisation(chains, parts, *extra, steps=3), tmp_path, ranks)
    assert timeless(full) == timeless(parts)
    weights = [load_file(folder / "final/model.safetensors") for folder in (full, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

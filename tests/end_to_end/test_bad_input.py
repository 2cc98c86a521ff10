"""Mistakes of the user: one line, exit code 2, before a model is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.ranks import run_stage
from tests.stages import (
    ZERO,
    ppo,
    reward,
    sft,
)

GOOD = {"prompt": "Hello!", "completion": "Of course!"}


def data(content: str) -> Callable[[Path], list[str]]:
    """Options that train on a file with this content."""

    def write(folder: Path) -> list[str]:
        (folder / "bad.jsonl").write_text(content)
        return ["--train_data", str(folder / "bad.jsonl")]

    return write


def record(**fields: object) -> Callable[[Path], list[str]]:
    """Options that train on a good record and then this one."""
    return data(f"{json.dumps(GOOD)}\n{json.dumps(fields)}\n")


def zero(**content: object) -> Callable[[Path], list[str]]:
    """Options with this DeepSpeed JSON."""

    def write(folder: Path) -> list[str]:
        (folder / "zero.json").write_text(json.dumps(content))
        return ["--zero_config", str(folder / "zero.json")]

    return write


def options(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: [word.replace("FOLDER", str(folder)) for word in words]


SFT_MISTAKES = {
    "unknown option": (options("--learning_rat", "1"), ["--learning_rat", "--learning_rate"]),
    "not a number": (options("--max_steps", "many"), ["--max_steps", "many"]),
    "out of range": (options("--learning_rate", "-1"), ["--learning_rate", "-1", "above 0"]),
    "missing file": (options("--train_data", "FOLDER/no.jsonl"), ["no.jsonl", "No such file"]),
    "kind of file": (options("--train_data", "FOLDER"), ["allowed: .jsonl"]),
    "not JSON": (data('{"prompt": \n'), ["bad.jsonl:1", "not valid JSON"]),
    "not an object": (data(f"{json.dumps(GOOD)}\n[1]\n"), ["bad.jsonl:2", "must be a JSON object"]),
    "missing field": (record(prompt="Hello!"), ["bad.jsonl:2", "'completion'"]),
    "empty prompt": (record(prompt=" ", completion="a"), ["bad.jsonl:2", "'prompt' is empty"]),
    "empty response": (record(prompt="a", completion=""), ["bad.jsonl:2", "'completion' is empty"]),
    "no assistant": (record(messages=[{"role": "user", "content": "a"}]), ["bad.jsonl:2", "no assistant"]),
    "unknown role": (record(messages=[{"role": "bot", "content": "a"}]), ["bad.jsonl:2", "'bot'", "allowed"]),
    "no rows": (data("\n"), ["bad.jsonl", "no rows left"]),
    "contradiction": (
        zero(train_batch_size=64, zero_optimization={"stage": 1}),
        ["zero.json", "train_batch_size is 64", "--global_batch_size is 8"],
    ),
    "ZeRO stage": (zero(zero_optimization={"stage": 4}), ["zero.json", "stage is 4"]),
    "ZeRO key": (zero(zero_optimisation={}), ["zero_optimisation", "did you mean 'zero_optimization'"]),
    "ZeRO file": (options("--zero_config", "FOLDER/no.json"), ["no.json", "No such file"]),
    "16 bits at stage 0": (zero(bf16={"enabled": True}), ["zero.json", "bf16 needs ZeRO stage 1"]),
    "no model": (options("--model_name_or_path", "FOLDER"), ["config.json is missing"]),
    "LoRA target": (
        options("--lora_rank", "4", "--lora_target_modules", "query"),
        ["--lora_target_modules query", "q_proj"],
    ),
    "required": (options("--model_name_or_path", ""), ["--model_name_or_path is required"]),
}  # fmt: skip


def check_refusal(module: str, words: list[str], parts: list[str], folder: Path, output: Path) -> None:
    before = sorted(output.rglob("*"))
    result = run_stage(module, words, folder)
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert result.codes == [2], result.output
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    for part in parts:
        assert part in lines[0]
    assert sorted(output.rglob("*")) == before  # nothing was written or lost


@pytest.mark.parametrize("mistake", SFT_MISTAKES)
def test_step_1_refuses(world: Path, tmp_path: Path, mistake: str) -> None:
    make, parts = SFT_MISTAKES[mistake]
    output = tmp_path / "out"
    check_refusal("step1_sft.main", [*sft(world, output), *make(tmp_path)], parts, tmp_path, output)


def test_step_2_refuses_an_incomplete_pair(world: Path, tmp_path: Path) -> None:
    make = record(prompt="a", chosen="b")
    words = [*reward(world, world / "model", tmp_path / "out"), *make(tmp_path)]
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b"}))
    check_refusal("step2_reward.main", words, ["bad.jsonl:1", "'rejected'"], tmp_path, tmp_path / "out")


def test_step_3_refuses_a_policy_as_the_reward_model(world: Path, run: Path, tmp_path: Path) -> None:
    words = ppo(world, run / "sft/final", run / "sft/final", tmp_path / "out")
    check_refusal(
        "step3_ppo.main",
        words,
        ["--reward_model_name_or_path", "not a reward model"],
        tmp_path,
        tmp_path / "out",
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--rollout_batch_size", "12"], ["--rollout_batch_size 12", "--global_batch_size 8"]),
        (["--samples_per_prompt", "3"], ["--rollout_batch_size 16", "--samples_per_prompt 3"]),
        (["--max_response_length", "256"], ["--max_response_length 256", "256 positions"]),
    ],
)
def test_step_3_refuses(world: Path, run: Path, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    start = run / "sft/final", run / "reward/final"
    check_refusal(
        "step3_ppo.main", [*ppo(world, *start, tmp_path / "out"), *words], parts, tmp_path, tmp_path / "out"
    )


def test_incomplete_checkpoint_is_refused(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "step_000002"
    broken.mkdir()
    words = [*sft(world, tmp_path / "out"), "--resume_from_checkpoint", str(broken)]
    result = run_stage("step1_sft.main", words, tmp_path)
    assert result.codes == [2] and "not a complete checkpoint" in result.output
    shutil.rmtree(broken)


def test_non_finite_weight_is_detected_in_any_partition(world: Path, tmp_path: Path) -> None:
    """At ZeRO-3 on two ranks, the last value of a weight is in the second rank's partition."""
    broken = tmp_path / "model"
    shutil.copytree(world / "model", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][-1, -1] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    words = [*sft(world, tmp_path / "out", 1), "--model_name_or_path", str(broken)]
    words += ["--zero_config", str(ZERO / "zero3.json")]
    result = run_stage("step1_sft.main", words, tmp_path, ranks=2)
    assert result.codes == [2, 2], result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert f"{broken}: weight model.layers.1.mlp.down_proj.weight holds NaN or Inf" in line

"""Resume after a stop, with damaged checkpoints, and with other ranks; or a refusal with the reason."""

import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from common.training.train_state import TrainState
from step3_ppo import main
from tests.ranks import Result, run_stage, start_stage, succeed
from tests.stages import (
    CLOSE,
    LORA,
    QLORA,
    ZERO,
    metrics,
    ppo,
    reward,
    sft,
    timeless,
)

STAGES = {"sft": "step1_sft.main", "reward": "step2_reward.main", "ppo": "step3_ppo.main"}
STOPPED = 75
WHOLE = [
    (stage, zero, adapters, ranks, precision)
    for stage, zero, adapters, ranks, precision in product(
        STAGES, (0, 1, 2, 3, "3_nodes"), ("full", "lora", "qlora"), (1, 2), ("fp32", "bf16")
    )
    if zero or precision == "fp32"  # DeepSpeed starts wrongly in 16 bits at stage 0: refused
    if adapters != "qlora" or zero in (0, 1, 2)
]
# Every stage, ZeRO stage, kind of weights, number of ranks and precision at least once.
SLICE = [
    ("sft", 0, "full", 1, "fp32"),
    ("sft", 3, "lora", 2, "bf16"),
    ("reward", 1, "lora", 2, "fp32"),
    ("reward", 2, "lora", 1, "bf16"),
    ("ppo", 0, "lora", 2, "fp32"),
    ("ppo", 2, "full", 2, "bf16"),
    ("ppo", 3, "full", 2, "fp32"),
    ("ppo", 3, "lora", 1, "fp32"),
    ("sft", "3_nodes", "full", 2, "fp32"),
    ("sft", 1, "qlora", 2, "bf16"),
    ("ppo", 0, "qlora", 1, "fp32"),
]
ADAPTERS = {"full": [], "lora": LORA, "qlora": QLORA}


def words(stage: str, world: Path, run: Path, output: Path, steps: int = 4) -> list[str]:
    start = run / "sft/final", run / "reward/final"
    if stage == "ppo":
        # What a resume must bring back: a moving coefficient, a schedule, the best evaluation.
        adaptive = ["--kl_controller", "adaptive", "--kl_target", "0.1", "--kl_horizon", "100"]
        return [
            *ppo(world, *start, output, steps),
            *adaptive,
            "--best_metric",
            "eval/score",
            "--eval_steps",
            "1",
        ]
    if stage == "reward":
        return reward(world, start[0], output, steps)
    return [*sft(world, output, steps), "--weight_decay", "0.5"]  # which only some weights have


def zero_config(folder: Path, stage: int | str, precision: str = "fp32") -> list[str]:
    config = json.loads((ZERO / f"zero{stage}.json").read_text())
    config |= {"bf16": {"enabled": precision == "bf16"}}
    path = folder / f"zero{stage}_{precision}.json"
    path.write_text(json.dumps(config))
    return ["--zero_config", str(path)]


def stop_after(module: str, options: list[str], folder: Path, output: Path, step: int, ranks: int) -> Result:
    """Start a stage and ask one rank to stop when the metrics of `step` are written."""
    running = start_stage(module, options, folder, ranks)
    running.wait_for(lambda: (output / "metrics.jsonl").exists() and step in steps_of(output))
    os.kill(running.pids[-1], signal.SIGTERM)
    return running.result()


def steps_of(output: Path) -> list[int]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def checkpoints(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").iterdir())


def assert_same_end(full: Path, parts: Path) -> None:
    weights = sorted(full.glob("final*/**/*.safetensors"))
    assert weights
    for file in weights:
        assert file.read_bytes() == (parts / file.relative_to(full)).read_bytes(), file
    assert timeless(full) == timeless(parts)


# --- exact --------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = WHOLE if metafunc.config.getoption("--whole") else SLICE
        metafunc.parametrize("case", cases, ids=lambda case: "-".join(map(str, case)))


def test_resumed_run_equals_an_uninterrupted_one(world: Path, run: Path, tmp_path: Path, case: tuple) -> None:
    """Same bytes in final/ and the same metrics lines, times aside."""
    stage, zero, adapters, ranks, precision = case
    if adapters == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs common/model/requirements-qlora.txt")
    extra = [*zero_config(tmp_path, zero, precision), *ADAPTERS[adapters]]
    full, parts = tmp_path / "full", tmp_path / "parts"
    succeed(STAGES[stage], [*words(stage, world, run, full, 6), *extra], tmp_path, ranks)
    options = [*words(stage, world, run, parts, 6), *extra]
    stopped = stop_after(STAGES[stage], options, tmp_path, parts, step=1, ranks=ranks)
    assert stopped.codes == [STOPPED] * ranks, stopped.output
    assert "Stopped at step " in stopped.output and not (parts / "final").exists()
    if adapters != "full":
        assert_only_adapters_are_saved(checkpoints(parts)[-1])
    succeed(STAGES[stage], options, tmp_path, ranks)
    assert_same_end(full, parts)


def test_stop_within_a_step_drops_the_step(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop while step 2 samples, and on the other rank while step 3 scores: each leaves out the rest."""
    full, parts = tmp_path / "full", tmp_path / "parts"
    extra = [*zero_config(tmp_path, 2), "--normalise_scores", "sum", "--whiten_rewards"]
    succeed(STAGES["ppo"], [*words("ppo", world, run, full, 4), *extra], tmp_path, ranks=2)
    options = [*words("ppo", world, run, parts, 4), *extra]
    for part, left_out, step in (
        ("sample_rollout", "score_rollout", 2), ("score_rollout", "shape_rewards", 3),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(main, part, ending_in_a_stop(getattr(main, part), rank=step - 2, calls=2))
            patch.setattr(main, left_out, failing_after(getattr(main, left_out), calls=1))
            stopped = run_stage(STAGES["ppo"], options, tmp_path, ranks=2)
        assert stopped.codes == [STOPPED] * 2, stopped.output
        assert f"Stopped at step {step - 1}; checkpoint {parts}/checkpoints/step_" in stopped.output
        assert steps_of(parts)[-1] == step - 1
    succeed(STAGES["ppo"], options, tmp_path, ranks=2)
    assert_same_end(full, parts)


def test_stop_within_the_first_step_saves_nothing(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = words("ppo", world, run, tmp_path / "out", 1)
    monkeypatch.setattr(main, "sample_rollout", ending_in_a_stop(main.sample_rollout, rank=0, calls=1))
    stopped = run_stage(STAGES["ppo"], options, tmp_path)
    line = "Stopped before the end of step 1. Run the same command to start again."
    assert stopped.codes == [STOPPED] and stopped.output.splitlines()[-1] == line
    assert not (tmp_path / "out/checkpoints").exists()


def ending_in_a_stop(function: Callable[..., Any], rank: int, calls: int) -> Callable[..., Any]:
    """A function that signals its own rank at the end of one of its calls."""
    count = itertools.count(1)

    def stop(*arguments: Any) -> Any:
        result = function(*arguments)
        if next(count) == calls and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    return stop


def failing_after(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    count = itertools.count(1)

    def fail(*arguments: Any) -> Any:
        assert next(count) <= calls
        return function(*arguments)

    return fail


def assert_only_adapters_are_saved(checkpoint: Path) -> None:
    """Neither frozen weights nor the second names of tied ones, as the output head is."""
    files = list(checkpoint.rglob("*model_states.pt"))
    assert files
    for file in files:
        saved = torch.load(file, weights_only=False)
        assert saved["module"] and not saved.get("frozen_param_fragments")
        for name in saved["module"]:
            assert "lora_" in name or "modules_to_save" in name, f"{file}: {name}"


# --- damage -------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    shard = max((folder / "policy").iterdir(), key=lambda file: file.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)


def flip(folder: Path) -> None:
    shard = next((folder / "policy").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


DAMAGES = {
    "truncated": (truncate, "bytes instead of"),
    "flipped": (flip, "a wrong checksum"),
    "missing": (lambda folder: next((folder / "policy").glob("*optim*")).unlink(), "is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_reported_and_the_previous_one_used(
    world: Path, tmp_path: Path, damage: str
) -> None:  # fmt: skip
    spoil, words_of_it = DAMAGES[damage]
    options = [*sft(world, tmp_path / "out", 4), "--save_steps", "2", *zero_config(tmp_path, 1)]
    succeed("step1_sft.main", options, tmp_path, ranks=2)
    expected = (tmp_path / "out/final/model.safetensors").read_bytes()
    spoil(tmp_path / "out/checkpoints/step_000004")
    named = ["--resume_from_checkpoint", str(tmp_path / "out/checkpoints/step_000004")]
    refused = run_stage("step1_sft.main", [*options, *named], tmp_path, ranks=2)
    assert refused.codes == [2, 2] and words_of_it in refused.output
    result = run_stage("step1_sft.main", options, tmp_path, ranks=2)
    assert result.codes == [0, 0], result.output
    assert "step_000004 is damaged" in result.output and words_of_it in result.output
    assert "resumed from" in result.output and "step_000002" in result.output
    assert (tmp_path / "out/final/model.safetensors").read_bytes() == expected


# --- another machine ----------------------------------------------------------------------------------------

MOVES = [  # (stage, ZeRO before and after, ranks before and after, weights)
    ("sft", 0, 0, 2, 1, "full"), ("reward", 0, 0, 1, 2, "lora"), ("sft", 1, 1, 1, 2, "full"),
    ("reward", 1, 2, 2, 2, "full"), ("ppo", 2, 1, 2, 1, "lora"),
    pytest.param(("ppo", 3, 3, 2, 1, "full"), marks=pytest.mark.rare),
    ("sft", 3, 3, 1, 2, "full"), ("reward", 3, 3, 2, 1, "lora"),
]  # fmt: skip


@pytest.mark.parametrize("move", MOVES, ids=str)
def test_resume_with_other_ranks_or_zero_stage(world: Path, run: Path, tmp_path: Path, move: tuple) -> None:
    """With other ranks, or between ZeRO 1 and 2, the next five steps equal those of the original run."""
    stage, zero_before, zero_after, ranks_before, ranks_after, adapters = move
    extra = LORA if adapters == "lora" else []
    before = [*zero_config(tmp_path, zero_before), *extra]
    after = [*zero_config(tmp_path, zero_after), *extra]
    full, parts = tmp_path / "full", tmp_path / "parts"
    succeed(STAGES[stage], [*words(stage, world, run, full, 8), *before], tmp_path, ranks_before)
    stopped = stop_after(
        STAGES[stage], [*words(stage, world, run, parts, 8), *before], tmp_path, parts, 1, ranks_before
    )
    assert set(stopped.codes) == {STOPPED}
    assert max(steps_of(parts)) <= 3
    succeed(STAGES[stage], [*words(stage, world, run, parts, 8), *after], tmp_path, ranks_after)
    names = ["value/loss", "reward/mean", "kl/mean"] if stage == "ppo" else ["train/loss", "train/grad_norm"]
    for name in names:
        assert metrics(parts, name) == pytest.approx(metrics(full, name), **CLOSE), name


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 0), (0, 1)])
def test_resume_of_weights_only_fits_every_zero_stage(
    world: Path, tmp_path: Path, before: int, after: int
) -> None:
    def words_of(stage: int, steps: int) -> list[str]:
        return [*sft(world, tmp_path / "out", steps), "--save_steps", "3", *zero_config(tmp_path, stage)]

    succeed("step1_sft.main", words_of(before, 3), tmp_path, ranks=2)
    refused = run_stage("step1_sft.main", words_of(after, 5), tmp_path, ranks=2)
    assert refused.codes == [2, 2]
    assert f"ZeRO stage {before}" in refused.output and "--resume_weights_only" in refused.output
    succeed("step1_sft.main", [*words_of(after, 3), "--resume_weights_only", "--export_only"], tmp_path, 2)
    exported = (tmp_path / "out/final/model.safetensors").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "out", other)
    shutil.rmtree(other / "final")
    succeed(
        "step1_sft.main",
        [*words_of(before, 3), "--output_dir", str(other), "--export_only"], tmp_path, ranks=2,
    )  # fmt: skip
    assert exported == (other / "final/model.safetensors").read_bytes()
    succeed("step1_sft.main", [*words_of(after, 5), "--resume_weights_only"], tmp_path, ranks=2)
    assert steps_of(tmp_path / "out")[-1] == 5
    # The fourth of five steps, by a cosine from 1e-3.
    rates = metrics(tmp_path / "out", "train/lr")
    assert rates[3] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 3 / 5)), rel=1e-6)


# --- the folder ---------------------------------------------------------------------------------------------


def test_changed_data_and_options_are_named(world: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(world / "demonstrations.jsonl", data)
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    options = [*sft(world, tmp_path / "out", 2), "--train_data", str(data), "--save_steps", "1"]
    options += ["--model_name_or_path", str(model)]
    succeed("step1_sft.main", options, tmp_path)

    refused = run_stage("step1_sft.main", [*options, "--learning_rate", "1"], tmp_path)
    assert refused.codes == [2]
    assert "--learning_rate 0.001 -> 1.0" in refused.output and "may differ: " in refused.output

    named = ["--resume_from_checkpoint", str(tmp_path / "out/checkpoints/step_000002")]
    other = [*options, "--output_dir", str(tmp_path / "other"), *named]
    refused = run_stage("step1_sft.main", [*other, "--learning_rate", "1"], tmp_path)
    assert refused.codes == [2] and f"{named[1]}: holds a different run" in refused.output
    succeed("step1_sft.main", other, tmp_path)

    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    refused = run_stage("step1_sft.main", options, tmp_path)
    assert refused.codes == [2] and f"{data} (--train_data, file 1) has changed" in refused.output
    data.write_text("\n".join(lines) + "\n")

    moved = data.rename(tmp_path / "moved.jsonl")  # the same content elsewhere is the same data
    succeed("step1_sft.main", [*options, "--train_data", str(moved)], tmp_path)

    template = next(model.glob("chat_template.jinja"))
    template.write_text("{# reworded #}" + template.read_text())
    refused = run_stage("step1_sft.main", [*options, "--train_data", str(moved)], tmp_path)
    assert refused.codes == [2] and "chat template of the tokenizer has changed" in refused.output
    shutil.copy(world / "model" / template.name, template)

    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused = run_stage("step1_sft.main", [*options, "--train_data", str(moved)], tmp_path)
    assert refused.codes == [2] and f"{model} (--model_name_or_path) has changed" in refused.output
    shutil.copy(world / "model" / weights.name, weights)

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(model)
    refused = run_stage("step1_sft.main", [*options, "--train_data", str(moved)], tmp_path)
    assert refused.codes == [2] and ": tokenizer has changed since" in refused.output


def test_one_run_at_a_time(world: Path, tmp_path: Path) -> None:
    options = sft(world, tmp_path / "out", 1000)
    first = start_stage("step1_sft.main", options, tmp_path, 1)
    first.wait_for(lambda: (tmp_path / "out/metrics.jsonl").exists())
    second = run_stage("step1_sft.main", options, tmp_path, ranks=2)
    assert second.codes == [2, 2] and f"in use by process {first.pids[0]} on " in second.output
    os.kill(first.pids[0], signal.SIGKILL)  # its lock goes with it
    first.result()
    succeed("step1_sft.main", sft(world, tmp_path / "out", 2), tmp_path)


def test_newest_and_best_checkpoints_stay(world: Path, tmp_path: Path) -> None:
    """The learning rate rises from 0 until the loss does: it is best early, not first and not last."""
    options = [*sft(world, tmp_path / "out", 8), "--learning_rate", "8", "--warmup_ratio", "1"]
    keep = ["--save_steps", "1", "--save_total_limit", "2", "--eval_steps", "1", "--best_metric", "eval/loss"]
    succeed("step1_sft.main", [*options, *keep, "--lr_scheduler_type", "constant_with_warmup"], tmp_path)
    losses = metrics(tmp_path / "out", "eval/loss")
    assert len(losses) == 9, "one is of the model to start from"
    best = losses.index(min(losses))
    assert 0 < best < 7, f"the best must not be among the newest: {losses}"
    names = [folder.name for folder in checkpoints(tmp_path / "out")]
    assert names == [f"step_{step:06}" for step in (best, 7, 8)]
    assert (tmp_path / "out/best/config.json").exists()


def test_resume_from_an_earlier_checkpoint(world: Path, tmp_path: Path) -> None:
    """Later steps are dropped when the run resumes from it, and not before."""
    options = [*sft(world, tmp_path / "out", 6), "--save_steps", "2", "--save_total_limit", "2"]
    succeed("step1_sft.main", options, tmp_path)
    expected = (tmp_path / "out/final/model.safetensors").read_bytes()
    named = ["--resume_from_checkpoint", str(tmp_path / "out/checkpoints/step_000004")]
    succeed("step1_sft.main", [*options, *named, "--export_only"], tmp_path)
    assert steps_of(tmp_path / "out")[-1] == 6 and len(checkpoints(tmp_path / "out")) == 2
    assert (tmp_path / "out/final/model.safetensors").read_bytes() != expected
    succeed("step1_sft.main", [*options, *named, "--max_steps", "5", "--eval_steps", "0"], tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["step_000004", "step_000005"]
    assert max(steps_of(tmp_path / "out")) == 5


def test_missing_metric_is_never_better() -> None:
    state = TrainState()
    assert not state.is_best("eval/score", {"eval/score": math.nan})
    assert state.is_best("eval/score", {"eval/score": -3.0})
    assert not state.is_best("eval/score", {"eval/score": math.nan})
    assert not state.is_best("eval/score", {"eval/score": -4.0})
    assert state.is_best("eval/score", {"eval/score": -2.0}) and state.best == -2.0


def test_export_only(world: Path, tmp_path: Path) -> None:
    options = [*sft(world, tmp_path / "out", 3), "--save_steps", "1"]
    refused = run_stage("step1_sft.main", [*options, "--export_only"], tmp_path)
    assert refused.codes == [2] and "holds no complete checkpoint" in refused.output
    succeed("step1_sft.main", options, tmp_path)
    expected = (tmp_path / "out/final/model.safetensors").read_bytes()
    before = (tmp_path / "out/metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "out/final")
    succeed("step1_sft.main", [*options, "--export_only"], tmp_path)
    assert (tmp_path / "out/final/model.safetensors").read_bytes() == expected
    assert (tmp_path / "out/metrics.jsonl").read_text() == before


def test_fewer_steps_are_refused_and_other_changes_logged(world: Path, tmp_path: Path) -> None:
    """Nothing is written then; an export is still possible."""

    def options(*steps: str) -> list[str]:
        return [*sft(world, tmp_path / "out", 4), "--save_steps", "3", *steps]

    def content() -> dict[Path, bytes]:
        files = [f for f in (tmp_path / "out").rglob("*") if f.is_file() and f.name != "run.lock"]
        return {file: file.read_bytes() for file in files}

    succeed("step1_sft.main", options(), tmp_path)
    before = content()
    refused = run_stage("step1_sft.main", options("--max_steps", "3"), tmp_path)
    assert refused.codes == [2], refused.output
    assert f"--max_steps 3: the run in {tmp_path}/out is at step 4 already" in refused.output
    refused = run_stage(
        "step1_sft.main", options("--max_steps", "0", "--num_train_epochs", "0.0029"), tmp_path
    )
    assert refused.codes == [2] and "--num_train_epochs 0.0029 (2 steps)" in refused.output, refused.output
    assert content() == before
    succeed("step1_sft.main", options("--max_steps", "3", "--export_only"), tmp_path)
    assert content() == before
    result = run_stage("step1_sft.main", options("--max_steps", "6"), tmp_path)
    assert result.codes == [0] and result.output.count("schedule of 6 steps") == 1, result.output
    assert "instead of 4; from step 5 on" in result.output
    rates = metrics(tmp_path / "out", "train/lr")
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in (4, 5)]
    assert rates[4:] == pytest.approx(expected, rel=1e-6)

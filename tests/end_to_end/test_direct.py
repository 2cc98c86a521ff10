"""Direct preference optimisation end to end: losses, reference, resume, refusals."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.runtime import progress
from step2_reward.direct import reference
from tests.end_to_end.test_bad_input import check_refusal
from tests.end_to_end.test_launch import bash
from tests.end_to_end.test_resume import STOPPED, assert_same_end, stop_after, zero_config
from tests.ranks import run_stage, start_stage, succeed
from tests.stages import (
    CLOSE,
    LORA,
    ZERO,
    metrics,
    reward,
)

MAIN = "step2_reward.direct.main"
SAME = ("train/loss", "train/grad_norm", "train/nll_chosen", "reward/margin", "eval/loss")


@pytest.fixture(scope="module")
def small(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little data of each kind: pairs, rankings with ties, single responses with a label."""
    folder = tmp_path_factory.mktemp("small")
    for name, size in (("preferences", 32), ("preferences_heldout", 12)):
        lines = (world / f"{name}.jsonl").read_text().splitlines()[:size]
        pairs = [json.loads(line) for line in lines]
        rankings, single = [], []
        for number, pair in enumerate(pairs):
            prompt, better, worse = pair["prompt"], pair["chosen"], pair["rejected"]
            others = [pairs[number - i - 1]["rejected"] for i in range(number % 3)]
            ranks = [1, 2, 2, 3][: 2 + len(others)]
            rankings.append({"prompt": prompt, "responses": [better, worse, *others], "ranks": ranks})
            single += [
                {"prompt": prompt, "completion": text, "label": text is better} for text in (better, worse)
            ]
        for kind, records in (("", pairs), ("rankings/", rankings), ("single/", single)):
            path = folder / f"{kind}{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def direct(data: Path, start: Path, output: Path, loss: str = "dpo", steps: int = 4) -> list[str]:
    return [*reward(data, start, output, steps), "--loss", loss, "--eval_steps", "2"]


def assert_same_metrics(one: Path, other: Path) -> None:
    for name in SAME:
        assert metrics(one, name) == pytest.approx(metrics(other, name), **CLOSE), name


def test_transformers_reproduces_the_loss_of_the_policy(
    small: Path, run: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Held-out loss, accuracy and NLL, computed by transformers alone from final/ and the starting model."""
    start, output = run / "sft/final", tmp_path / "out"
    succeed(MAIN, direct(small, start, output), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(output / "final")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (output / "final", start)]
    losses, right, nll, tokens = [], 0.0, 0.0, 0
    for line in (small / "preferences_heldout.jsonl").read_text().splitlines():
        record, rewards = json.loads(line), []
        prompt = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
        for side in ("chosen", "rejected"):
            full = tokenizer.apply_chat_template(record["prompt"] + record[side], tokenize=False)
            ids = tokenizer(full, return_tensors="pt").input_ids
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt).input_ids)] = -100
            count = int((labels != -100).sum())
            sums = [-model(ids, labels=labels).loss.item() * count for model in models]
            rewards.append(0.1 * (sums[0] - sums[1]))
            if side == "chosen":
                nll, tokens = nll - sums[0], tokens + count
        difference = torch.tensor(rewards[0] - rewards[1])
        losses.append(-torch.nn.functional.logsigmoid(difference).item())
        right += float(difference > 0)
    assert metrics(output, "eval/loss")[-1] == pytest.approx(sum(losses) / 12, **CLOSE)
    assert metrics(output, "eval/accuracy")[-1] == pytest.approx(right / 12)
    assert metrics(output, "eval/nll_chosen")[-1] == pytest.approx(nll / tokens, **CLOSE)
    for before in ("train/loss", "eval/loss"):  # policy and reference are one
        assert metrics(output, before)[0] == pytest.approx(0.6931472)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4]


@pytest.mark.parametrize(
    ("loss", "kind", "zero"),
    [
        ("dpo", "rankings", 3),
        ("kto", "single", 2),
        ("ipo", ".", 2),
        ("orpo", "rankings", 0),
        ("simpo", ".", 3),
        pytest.param("aot_unpaired", "rankings", 3, marks=pytest.mark.rare),
        pytest.param("apo_zero_unpaired", "single", 1, marks=pytest.mark.rare),
    ],
)
def test_ranks_and_micro_batches_change_nothing(
    small: Path, run: Path, tmp_path: Path, loss: str, kind: str, zero: int
) -> None:  # fmt: skip
    start = run / "sft/final"
    succeed(MAIN, direct(small / kind, start, tmp_path / "one", loss), tmp_path)
    other = [
        "--micro_batch_size",
        "1",
        "--gradient_checkpointing",
        "--zero_config",
        str(ZERO / f"zero{zero}.json"),
    ]
    succeed(MAIN, [*direct(small / kind, start, tmp_path / "two", loss), *other], tmp_path, ranks=2)
    assert_same_metrics(tmp_path / "two", tmp_path / "one")
    if loss == "kto":
        assert max(metrics(tmp_path / "one", "kl/reference_point")) > 0
        assert metrics(tmp_path / "two", "kl/reference_point") == pytest.approx(
            metrics(tmp_path / "one", "kl/reference_point"), **CLOSE
        )


@pytest.mark.parametrize(
    ("loss", "kind", "extra"),
    [
        ("aot", ".", ["--ld_alpha", "0.5", "--label_smoothing", "0.1"]),
        ("exo_pair", "rankings", ["--wpo", "--f_divergence", "js_divergence"]),
    ],
)
def test_script_on_two_ranks_is_one_rank_in_this_process(
    small: Path, run: Path, tmp_path: Path, loss: str, kind: str, extra: list[str]
) -> None:
    start = run / "sft/final"
    succeed(MAIN, [*direct(small / kind, start, tmp_path / "one", loss), *extra], tmp_path)
    words = [*direct(small / kind, start, tmp_path / "two", loss), *extra, "--micro_batch_size", "1"]
    done = bash("step2_direct.sh", words, tmp_path, NUM_GPUS="2")
    assert done.returncode == 0, done.stdout
    assert_same_metrics(tmp_path / "two", tmp_path / "one")


def test_split_pair_trains_like_its_two_responses(small: Path, run: Path, tmp_path: Path) -> None:
    """Batches of all of them: good and bad responses to other prompts leave the reference point at 0, where
    good ones alone would raise it from the second step on.
    """
    for kind, size in ((".", "32"), ("single", "64")):
        options = direct(small / kind, run / "sft/final", tmp_path / kind / "out", "kto", steps=6)
        succeed(MAIN, [*options, "--global_batch_size", size], tmp_path)
    for name in ("train/loss", "train/grad_norm", "train/nll_chosen", "logprobs/chosen", "logprobs/rejected"):
        one, other = (metrics(tmp_path / kind / "out", name) for kind in (".", "single"))
        assert len(one) == 6 and one == pytest.approx(other, **CLOSE), name


@pytest.mark.parametrize(
    ("loss", "zero", "precision", "ranks", "extra"),
    [
        ("dpo", 0, "fp32", 1, []),
        ("kto", 2, "bf16", 2, []),
        pytest.param("dpo", 3, "fp32", 2, LORA, marks=pytest.mark.rare),
        pytest.param("bco_pair", 1, "fp32", 2, ["--bco_shift"], marks=pytest.mark.rare),
        pytest.param("aot", 3, "bf16", 2, ["--ld_alpha", "0.5"], marks=pytest.mark.rare),
    ],
    ids=str,
)
def test_resumed_run_equals_an_uninterrupted_one(
    small: Path, run: Path, tmp_path: Path, loss: str, zero: int, precision: str, ranks: int, extra: list[str]
) -> None:  # fmt: skip
    """Same bytes in final/, same metrics. The reference is the initial model in both parts."""
    extra = [*extra, *zero_config(tmp_path, zero, precision), "--cache_dir", str(tmp_path / "cache")]
    full, parts = tmp_path / "full", tmp_path / "parts"
    succeed(MAIN, [*direct(small, run / "sft/final", full, loss, 6), *extra], tmp_path, ranks)
    options = [*direct(small, run / "sft/final", parts, loss, 6), *extra]
    stopped = stop_after(MAIN, options, tmp_path, parts, step=1, ranks=ranks)
    assert stopped.codes == [STOPPED] * ranks, stopped.output
    assert "are in the cache" in stopped.output and not (parts / "final").exists()
    shutil.rmtree(tmp_path / "cache")
    succeed(MAIN, options, tmp_path, ranks)
    assert_same_end(full, parts)


@pytest.mark.parametrize(("zero", "ranks", "extra"), [(0, 1, []), (3, 2, LORA)], ids=str)
def test_reference_can_be_another_model(
    world: Path, small: Path, run: Path, tmp_path: Path, zero: int, ranks: int, extra: list[str]
) -> None:  # fmt: skip
    """A copy of the initial model gives the same result from the same cache; other weights do not."""
    extra = [*extra, "--zero_config", str(ZERO / f"zero{zero}.json"), "--cache_dir", str(tmp_path / "cache")]
    shutil.copytree(run / "sft/final", tmp_path / "copy")
    succeed(MAIN, [*direct(small, run / "sft/final", tmp_path / "alone"), *extra], tmp_path, ranks)
    files = sorted((tmp_path / "cache").glob("reference_*.npy"))
    assert len(files) == 2  # training and held-out data
    for name, path in (("same", tmp_path / "copy"), ("other", world / "model")):
        options = direct(small, run / "sft/final", tmp_path / name)
        words = [*options, *extra, "--reference_model_name_or_path", str(path)]
        result = run_stage(MAIN, words, tmp_path, ranks)
        assert result.codes == [0] * ranks, result.output
        assert ("are in the cache" in result.output) == (name == "same")
    assert_same_metrics(tmp_path / "same", tmp_path / "alone")
    assert len(list((tmp_path / "cache").glob("reference_*.npy"))) == 4
    assert (
        abs(metrics(tmp_path / "other", "logratio/mean")[0]) > 0.1
    )  # the SFT model is not the untrained one


def test_stop_during_reference_logprobs(small: Path, run: Path, tmp_path: Path) -> None:
    """Nothing is saved yet, and the same command resumes."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "stop").touch()
    options = [*direct(small, run / "sft/final", output), "--cache_dir", str(tmp_path / "cache")]
    result = start_stage(MAIN, options, tmp_path).result()
    assert result.codes == [STOPPED] and "Stopped before the first step" in result.output, result.output
    succeed(MAIN, options, tmp_path)


def test_signal_during_reference_logprobs_reports_what_is_saved(
    small: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(reference, "ROUNDS", 2)
    for name in ("FIRST_LINE", "NEXT_LINES"):
        monkeypatch.setattr(progress, name, -1)
    read, calls = reference.logprobs_of_all, []

    def read_and_stop(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(*arguments)

    monkeypatch.setattr(reference, "logprobs_of_all", read_and_stop)
    words = [*direct(small, run / "sft/final", tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    stopped = run_stage(MAIN, words, tmp_path)
    assert stopped.codes == [STOPPED], stopped.output
    counts = re.search(r"log-probabilities of (\d+) of (\d+) records are in the cache", stopped.output)
    (file,) = (tmp_path / "cache").glob("reference_*.npy")
    assert (~np.isnan(np.load(file)).any(1)).sum() == int(counts[1]) > 0


def test_reference_logprobs_survive_a_kill(
    small: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Also with another number of ranks. The log names the remaining part."""
    monkeypatch.setattr(reference, "ROUNDS", 2)
    for name in ("FIRST_LINE", "NEXT_LINES"):
        monkeypatch.setattr(progress, name, -1)
    keep = reference._save
    words = [*direct(small / "rankings", run / "sft/final", tmp_path / "out"), "--cache_dir"]
    succeed(MAIN, [*words, str(tmp_path / "full"), "--output_dir", str(tmp_path / "once")], tmp_path)

    def keep_and_die(file: Path, logprobs: torch.Tensor) -> None:
        keep(file, logprobs)
        if (~logprobs.isnan().any(1)).sum() == 12 and len(logprobs) == 32:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(reference, "_save", keep_and_die)
    killed = run_stage(MAIN, [*words, str(tmp_path / "cache")], tmp_path)
    assert killed.codes == [-signal.SIGKILL] and "12/32 (38%)" in killed.output, killed.output
    monkeypatch.setattr(reference, "_save", keep)
    result = run_stage(MAIN, [*words, str(tmp_path / "cache")], tmp_path, ranks=2)
    assert result.codes == [0, 0] and "log-probabilities of 20 records computed" in result.output, (
        result.output
    )
    full, parts = (sorted((tmp_path / name).glob("reference_*")) for name in ("full", "cache"))
    assert [file.name for file in parts] == [file.name for file in full] and len(full) == 2
    for one, other in zip(full, parts, strict=True):
        assert np.load(other) == pytest.approx(np.load(one), **CLOSE)


def test_reference_logprobs_are_computed_for_the_rows_of_the_steps(
    small: Path, run: Path, tmp_path: Path
) -> None:
    """The rest follows with more steps, with the same result as all at once."""
    full, parts = (
        [*direct(small, run / "sft/final", tmp_path / name), "--cache_dir", str(tmp_path / f"{name}.cache")]
        for name in ("full", "parts")
    )
    constant = ["--lr_scheduler_type", "constant", "--save_steps", "1", "--max_steps"]
    result = run_stage(MAIN, [*parts, *constant, "1"], tmp_path)
    assert result.codes == [0] and "\nreference log-probabilities of 8 records computed" in result.output, (
        result.output
    )
    assert "\nreference log-probabilities of 12 records computed" in result.output, "the held-out ones"
    result = run_stage(MAIN, [*parts, *constant, "3"], tmp_path)
    assert result.codes == [0] and "log-probabilities of 16 records computed" in result.output, result.output
    assert (
        "reference log-probabilities: 8 of 24 records" in result.output
        and "12 of 12 records" in result.output
    )
    succeed(MAIN, [*full, *constant, "3"], tmp_path)
    for name in ("train/loss", "train/grad_norm", "reward/margin"):
        result, expected = (metrics(tmp_path / folder, name) for folder in ("parts", "full"))
        assert result == pytest.approx(expected, **CLOSE), name


def test_export_needs_no_reference(small: Path, run: Path, tmp_path: Path) -> None:
    """For a finished run, and with --export_only, without the cache."""
    options = [*direct(small, run / "sft/final", tmp_path / "out"), "--save_steps", "2"]
    options += ["--cache_dir", str(tmp_path / "cache")]
    succeed(MAIN, options, tmp_path)
    weights = (tmp_path / "out/final/model.safetensors").read_bytes()
    for more in ([], ["--export_only", "--max_steps", "6"]):
        shutil.rmtree(tmp_path / "cache")
        shutil.rmtree(tmp_path / "out/final")
        result = run_stage(MAIN, [*options, *more], tmp_path)
        assert result.codes == [0] and "reference log-probabilities" not in result.output, result.output
        assert (tmp_path / "out/final/model.safetensors").read_bytes() == weights
    assert metrics(tmp_path / "out", "eval/loss")[0] == pytest.approx(0.6931472)


def other_vocabulary(run: Path, folder: Path) -> str:
    shutil.copytree(run / "sft/final", folder / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder / "other")
    tokenizer.add_tokens(["Triptych"])
    tokenizer.save_pretrained(folder / "other")
    return str(folder / "other")


REFERENCE = "--reference_model_name_or_path"
MISTAKES = {
    "no pairs": (["--train_data", "SMALL/single/preferences.jsonl"], ["preferences.jsonl:1", "kto takes"]),
    "no label": (["--loss", "kto", "--train_data", "FOLDER/bad.jsonl"], ["bad.jsonl:1", "'label' is missin"]),
    "label": (["--loss", "kto", "--train_data", "FOLDER/no.jsonl"], ["no.jsonl:1", "'no'", "true or false"]),
    "reference": ([REFERENCE, "OTHER"], [REFERENCE, "another vocabulary"]),
    "needless": (["--loss", "orpo", REFERENCE, "x"], [REFERENCE, "orpo does not take it", "allowed: dpo"]),
    "smoothing": (["--loss", "ipo", "--label_smoothing", "0.1"], ["--label_smoothing 0.1", "ipo", "robust"]),
    "loss": (["--loss", "ppo"], ["--loss", "'ppo'", "orpo"]),
    "metric": (["--best_metric", "eval/score"], ["--best_metric", "'eval/score'", "eval/accuracy"]),
    "ties": (["--best_metric", "eval/accuracy", "--eval_data", "FOLDER/ties.jsonl"], ["are all ties"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(small: Path, run: Path, tmp_path: Path, mistake: str) -> None:
    single = {"prompt": "a", "completion": "b"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(single))
    (tmp_path / "no.jsonl").write_text(json.dumps(single | {"label": "no"}))
    tie = {"prompt": "a", "chosen": "b", "rejected": "c", "tie": True}
    (tmp_path / "ties.jsonl").write_text(json.dumps(tie))
    words, parts = MISTAKES[mistake]
    places = {"SMALL": str(small), "FOLDER": str(tmp_path), "OTHER": ""}
    if "OTHER" in words:
        places["OTHER"] = other_vocabulary(run, tmp_path)
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    output = tmp_path / "out"
    check_refusal(MAIN, [*direct(small, run / "sft/final", output), *words], parts, tmp_path, output)

"""Evaluation of reward models: metrics, and a verdict for each kind of problem."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.runtime import process
from step2_reward import main
from step2_reward.evaluation import main as evaluate
from tests.end_to_end.test_bad_input import check_refusal
from tests.ranks import succeed
from tests.stages import (
    metrics,
    reward,
)


def evaluate_models(models: list[Path], data: Path, output: Path, *words: str, ranks: int = 1) -> dict:
    options = ["--reward_model_name_or_path", *map(str, models), "--eval_data", str(data)]
    succeed("step2_reward.evaluation.main", [*options, "--output_dir", str(output), *words], output, ranks)
    return json.loads((output / "report.json").read_text())


def held_out(world: Path, count: int) -> list[dict]:
    lines = (world / "preferences_heldout.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_metrics_match_those_of_training(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The report of step 2, and the command on one rank and on two, match eval/accuracy and eval/loss."""

    def write_unstopped(*arguments: object) -> None:
        assert process._last_line is None, "a stop of rank 0 alone would make the others wait"
        evaluate.write_report(*arguments)

    monkeypatch.setattr(main, "write_report", write_unstopped)
    data = write(tmp_path / "golden.jsonl", held_out(world, 40))
    options = [*reward(world, run / "sft/final", tmp_path / "out"), "--max_eval_samples", "0"]
    succeed("step2_reward.main", [*options, "--eval_data", str(data), "--golden_data", str(data)], tmp_path)
    report = json.loads((tmp_path / "out/golden/report.json").read_text())
    assert report["accuracy"]["accuracy"] == pytest.approx(metrics(tmp_path / "out", "eval/accuracy")[-1])
    assert report["prediction"]["log_loss"] == pytest.approx(
        metrics(tmp_path / "out", "eval/loss")[-1], rel=1e-5
    )
    for ranks in (1, 2):
        again = evaluate_models([tmp_path / "out/final"], data, tmp_path / f"ranks_{ranks}", ranks=ranks)
        assert again["accuracy"] == report["accuracy"] and again["verdicts"] == report["verdicts"]
        assert again["scores"]["all"] == pytest.approx(report["scores"]["all"], rel=1e-4, abs=1e-5)
    for name in ("reliability.png", "scores.png"):
        assert (tmp_path / "ranks_2" / name).read_bytes().startswith(b"\x89PNG")


def test_an_ensemble_of_one_model_twice_matches_the_model(world: Path, run: Path, tmp_path: Path) -> None:
    """Only the verdicts on probabilities differ: they need raw scores."""
    data = write(tmp_path / "pairs.jsonl", held_out(world, 20))
    model = with_head(1e4)(world, run, tmp_path)
    one = evaluate_models([model], data, tmp_path / "one")
    two = evaluate_models([model, model], data, tmp_path / "two", "--reward_combine", "mean_std")
    assert two["scores"] == one["scores"] and two["accuracy"] == one["accuracy"]
    kinds = [[verdict["found"].split(":")[0] for verdict in each["verdicts"]] for each in (one, two)]
    assert "Saturated scores" in kinds[0] and "Saturated scores" not in kinds[1]


def with_head(factor: float) -> Callable[[Path, Path, Path], Path]:
    """Multiply the head of a finished model."""

    def make(_: Path, run: Path, folder: Path) -> Path:
        shutil.copytree(run / "reward/final", folder / "final")
        weights = load_file(folder / "final/model.safetensors")
        weights["score.weight"] = weights["score.weight"] * factor
        save_file(weights, folder / "final/model.safetensors", {"format": "pt"})
        return folder / "final"

    return make


def trained(
    records: Callable[[Path], list[dict]], steps: int, eval_steps: int
) -> Callable[[Path, Path, Path], Path]:
    """Train a model on these records."""

    def make(world: Path, _: Path, folder: Path) -> Path:
        data = write(folder / "train.jsonl", records(world))
        words = [*reward(world, world / "model", folder, steps), "--train_data", str(data)]
        words += ["--learning_rate", "1e-2", "--eval_steps", str(eval_steps), "--logging_steps", "5"]
        succeed("step2_reward.main", words, folder)
        return folder / "final"

    return make


def longer_is_better(_: Path) -> list[dict]:
    rng = random.Random(0)
    words = ["yes", "no", "well", "so", "then"]

    def text(count: int) -> str:
        return "".join(f" {rng.choice(words)}" for _ in range(count))

    return [{"prompt": text(3), "chosen": text(rng.randint(9, 12)), "rejected": text(2)} for _ in range(400)]


def by_chance(world: Path) -> list[dict]:
    """Sixteen pairs with random labels, to be memorised."""
    rng = random.Random(0)
    records = held_out(world, 16)
    for record in records:
        if rng.random() < 0.5:
            record["chosen"], record["rejected"] = record["rejected"], record["chosen"]
    return records


BROKEN = {
    "Low accuracy": (with_head(1.0), None),
    "Collapsed scores": (with_head(0.0), None),
    "Saturated scores": (with_head(1e4), None),
    "Overfitting": (trained(by_chance, 80, 10), None),
    "Scores follow length": (trained(longer_is_better, 60, 0), longer_is_better),
    "Accuracy too high": (trained(longer_is_better, 60, 0), longer_is_better),
}


@pytest.mark.parametrize("verdict", BROKEN)
def test_each_problem_gets_its_verdict(world: Path, run: Path, tmp_path: Path, verdict: str) -> None:
    make, records = BROKEN[verdict]
    model = make(world, run, tmp_path)
    data = write(tmp_path / "judged.jsonl", records(world) if records else held_out(world, 400))
    report = evaluate_models([model], data, tmp_path / "report")
    assert any(one["found"].startswith(verdict) and one["advice"] for one in report["verdicts"]), report[
        "verdicts"
    ]


def test_bad_input_is_one_line(world: Path, run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", held_out(world, 2))
    ties = write(tmp_path / "ties.jsonl", [record | {"tie": True} for record in held_out(world, 2)])
    bad = write(tmp_path / "bad.jsonl", [*held_out(world, 2), {"prompt": "a", "chosen": "b"}])
    model, policy = str(run / "reward/final"), str(run / "sft/final")
    for words, parts in (
        ([model, "--eval_data", str(bad)], ["bad.jsonl:3", "'rejected' is missing"]),
        ([model, "--eval_data", str(tmp_path / "no.jsonl")], ["no.jsonl: No such file"]),
        ([policy, "--eval_data", str(data)], [policy, "not a reward model"]),
        ([model, "--eval_data", str(ties)], ["ties.jsonl: every pair is a tie"]),
        (
            [model, "--eval_data", str(data), "--max_length", "8"],
            ["pairs.jsonl: no rows left: 2 records read: 2 too long"],
        ),
        ([model, "--eval_data", str(data), "--reward_weights", "1", "2"], ["--reward_weights 1 2"]),
    ):
        output = tmp_path / "out"
        words = ["--reward_model_name_or_path", *words, "--output_dir", str(output)]
        check_refusal("step2_reward.evaluation.main", words, parts, tmp_path, output)

"""Step 3 with a reward-model ensemble: scores equal the combined scores of single runs."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import step3_ppo.main
from common.text.segments import find_prompt
from tests.ranks import run_stage, succeed
from tests.stages import (
    LORA,
    ZERO,
    metrics,
    ppo,
)


def make_other(folder: Path, source: Path) -> Path:
    """Another reward model, with another chat template."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "Q: ").replace(
        "<|assistant|>", " A: "
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.score.weight.data = model.score.weight.data.flip(1)
    model.config.reward_mean += 0.3
    model.save_pretrained(folder)
    return folder


def keep_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write scores.pt to their output folder: those of the members and of the rollout, and the texts."""
    score_rollout = step3_ppo.main.score_rollout

    def spy(models, prompts, rollout, *rest):
        scored = score_rollout(models, prompts, rollout, *rest)
        texts = [
            models.encoder.decode_response(rollout.prompt(row), rollout.response(row))
            for row in range(len(prompts))
        ]
        result = {"scores": scored.scores, "of_members": scored.score_parts.T, "texts": texts}
        result["prompts"] = [find_prompt(prompt.record) for prompt in prompts]
        torch.save(result, Path(sys.argv[sys.argv.index("--output_dir") + 1]) / "scores.pt")
        return scored

    monkeypatch.setattr(step3_ppo.main, "score_rollout", spy)


def test_ensemble_members_score_as_single_models(
    world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """One rollout is scored by either model alone, and by both: without ZeRO, partitioned on two ranks, and
    beside adapters. The second reads other tokens than the actor.
    """
    keep_scores(monkeypatch)
    one, two = run / "reward/final", make_other(tmp_path / "other", run / "reward/final")

    def scores(name: str, *words: str, ranks: int = 1) -> dict:
        options = [*ppo(world, run / "sft/final", one, tmp_path / name, steps=1), "--eval_fraction", "0"]
        succeed("step3_ppo.main", [*options, *words], tmp_path, ranks)
        return torch.load(tmp_path / name / "scores.pt")

    alone = [scores("one"), scores("two", "--reward_model_name_or_path", str(two))]
    assert alone[0]["texts"] == alone[1]["texts"] and len(alone[0]["texts"]) == 16
    a, b = (result["scores"].double().numpy() for result in alone)
    assert np.abs(a - b).min() > 1e-3
    both = ["--reward_model_name_or_path", str(one), str(two)]
    weighted = np.average([a, b], axis=0, weights=[1, 3])
    deviation = np.sqrt(np.average([(a - weighted) ** 2, (b - weighted) ** 2], axis=0, weights=[1, 3]))
    spread = [*both, "--reward_combine", "mean_std", "--reward_std_coef", "0.5", "--reward_weights", "1", "3"]
    zero3 = ["--zero_config", str(ZERO / "zero3.json")]
    for result, expected in {
        "mean": (scores("mean", *both, *LORA), (a + b) / 2),
        "min": (scores("min", *both, *zero3, "--reward_combine", "min", ranks=2), np.minimum(a, b)),
        "mean_std": (scores("mean_std", *spread), weighted - 0.5 * deviation),
    }.values():
        np.testing.assert_allclose(result["of_members"], [a, b], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result["scores"], expected, rtol=1e-5, atol=1e-5)
    assert metrics(tmp_path / "min", "reward/mean_2") == pytest.approx([b.mean()], abs=1e-5)
    assert metrics(tmp_path / "min", "reward/std_between") == pytest.approx(
        [np.abs(a - b).mean() / 2], abs=1e-5
    )
    assert metrics(tmp_path / "one", "reward/std_between") == []


def test_resume_requires_the_same_ensemble(world: Path, run: Path, tmp_path: Path) -> None:
    """A resumed run must have the same members in the same order, and as many weights."""
    one, two = run / "reward/final", make_other(tmp_path / "other", run / "reward/final")
    options = [*ppo(world, run / "sft/final", one, tmp_path / "out", steps=1)]
    both = ["--reward_model_name_or_path", str(one), str(two)]
    anew = [*both, "--output_dir", str(tmp_path / "another")]
    succeed("step3_ppo.main", [*options, *both], tmp_path)
    for words, parts in {
        (): ["model 2 of --reward_model_name_or_path", "tokenizer of reward model 2"],
        (both[0], str(two), str(one)): [
            f"{two} (--reward_model_name_or_path, model 1)",
            f"{one} (--reward_model",
        ],
        (*both, "--reward_combine", "min"): ["--reward_combine mean -> min"],
        (*anew, "--reward_weights", "1"): ["--reward_weights 1: must be 2 numbers above 0"],
        (*anew, "--reward_weights", "1", "2", "--reward_combine", "min"): [
            "--reward_weights 1 2",
            "mean_std",
        ],
        (both[0], str(one), str(run / "sft/final")): [str(run / "sft/final"), "not a reward model"],
    }.items():
        result = run_stage("step3_ppo.main", [*options, *words], tmp_path)
        assert result.codes == [2], result.output
        (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
        assert all(part in line for part in parts), line

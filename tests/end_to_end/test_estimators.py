"""Step 3 without a critic, and with reward functions."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_stage, succeed
from tests.stages import (
    LORA,
    metrics,
    ppo,
)

FUNCTIONS = """
import json, os

def by_length(prompts, responses, records):
    assert len(prompts) == len(responses) == len(records) and all("prompt" in r for r in records)
    return [float(len(text)) for text in responses]

def by_letter(prompts, responses, records):
    return [text.count("e") - 2.0 for text in responses]

def between(prompts, responses, records):
    return [0.0] * len(responses)

def raises(prompts, responses, records):
    return [1 / (record != json.loads(os.environ["CULPRIT"])) for record in records]

def not_a_number(prompts, responses, records):
    return [float("nan")] * len(responses)

def too_few(prompts, responses, records):
    return [0.0]

def no_list(prompts, responses, records):
    return None
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "good.py"
    path.write_text(FUNCTIONS)
    return path


def options(world: Path, run: Path, output: Path, *words: str, steps: int = 3) -> list[str]:
    start = run / "sft/final", run / "reward/final"
    return [*ppo(world, *start, output, steps), "--samples_per_prompt", "4", *words]


ESTIMATORS = {
    "reinforce": ["--reinforce_baseline", "moving", "--normalise_scores", "sum"],
    "rloo": LORA,
    "group": ["--repetition_penalty", "0.5", "--length_penalty", "0.01"],
    "reinforce_pp": ["--whiten_rewards"],
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_without_a_critic_on_one_and_two_ranks(name, world, run, tmp_path):
    """Two ranks equal one; a run in two parts ends with the same bytes."""
    words = [*ESTIMATORS[name], "--advantage_estimator", name]
    one, two, parts = (tmp_path / part for part in ("one", "two", "parts"))
    succeed("step3_ppo.main", options(world, run, one, *words), tmp_path)
    assert not (one / "final_critic").exists()
    assert metrics(one, "policy/ratio") == pytest.approx([1.0] * 3, abs=1e-5)
    assert not metrics(one, "value/loss")
    succeed("step3_ppo.main", options(world, run, two, *words), tmp_path, 2)
    for figure in ("reward/mean", "policy/approx_kl", "kl/mean"):
        assert metrics(two, figure) == pytest.approx(metrics(one, figure), rel=1e-3, abs=1e-5)
    for steps in (1, 3):
        going_on = ["--max_steps", str(steps), "--save_steps", "1", "--lr_scheduler_type", "constant"]
        succeed("step3_ppo.main", options(world, run, parts, *words, *going_on), tmp_path)
    full = tmp_path / "full"
    succeed("step3_ppo.main", options(world, run, full, *words, "--lr_scheduler_type", "constant"), tmp_path)
    weights = "final/model.safetensors"
    assert (parts / weights).read_bytes() == (full / weights).read_bytes()
    assert metrics(parts, "reward/mean") == metrics(full, "reward/mean")


def test_functions_score_with_and_without_a_reward_model(world, run, functions, tmp_path):
    """Scores are the weighted sum of the parts. Without a reward model, the critic is new."""
    words = ["--reward_function", f"{functions}:by_length:0.1", f"{functions}:by_letter:-2"]
    both, alone = tmp_path / "both", tmp_path / "alone"
    succeed("step3_ppo.main", options(world, run, both, *words, "--bootstrap_truncated"), tmp_path, 2)
    parts = [metrics(both, f"reward/mean_{name}") for name in ("1", "by_length", "by_letter")]
    expected = [model + 0.1 * length - 2 * letter for model, length, letter in zip(*parts, strict=True)]
    assert metrics(both, "reward/mean") == pytest.approx(expected, rel=1e-5)
    without = options(world, run, alone, *words)
    place = without.index("--reward_model_name_or_path")
    del without[place : place + 2]
    result = run_stage("step3_ppo.main", without, tmp_path)
    assert result.codes == [0], result.output
    assert "there is no reward model" in result.output
    assert metrics(alone, "reward/mean_by_length")[0] == pytest.approx(parts[1][0], rel=1e-6)
    refused = run_stage("step3_ppo.main", without[: without.index("--reward_function")], tmp_path)
    assert "--reward_function or --process_model_name_or_path is required" in refused.output


BAD = {
    "missing.py:f": ["there is no file"],
    "{file}": ["FILE.py:NAME"],
    "{file}:nothing": ["has no function nothing"],
    "{file}:between": ["--reward_function between", "rename the function"],
    "{file}:by_length {file}:by_length:2": ["by_length is given twice"],
    "{file}:raises": ["raises", "ZeroDivisionError: division by zero", "{record}"],
    "{file}:not_a_number": ["not_a_number: returned nan for record", "finite number"],
    "{file}:too_few": ["too_few: returned 1 scores for 8 responses"],
    "{file}:no_list": ["no_list: must return a list of numbers, not None"],
}


@pytest.mark.parametrize("source", BAD)
def test_failing_function_is_one_line(
    source, world, run, functions, tmp_path, monkeypatch
):  # fmt: skip
    """On two ranks, the first one with a problem reports it for both."""
    lines = (world / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[:4]))
    monkeypatch.setenv("CULPRIT", lines[2])
    words = ["--reward_function", *source.format(file=functions).split(), "--eval_fraction", "0"]
    words += ["--prompt_data", str(tmp_path / "prompts.jsonl")]
    result = run_stage("step3_ppo.main", options(world, run, tmp_path / "out", *words, steps=1), tmp_path, 2)
    assert set(result.codes) == {2}, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    for part in BAD[source]:
        assert part.format(record=json.dumps(json.loads(lines[2]))[:100]) in line


def test_options_that_contradict_each_other(world, run, tmp_path):
    for words, part in {
        ("--advantage_estimator", "rloo", "--samples_per_prompt", "1"): "needs at least 2",
        ("--advantage_estimator", "group", "--critic_warmup_steps", "3"): "has no critic",
        ("--advantage_estimator", "rloo", "--bootstrap_truncated"): "has no critic",
        ("--advantage_estimator", "rloo", "--critic_gae_lambda", "1"): "has no critic",
    }.items():
        refused = run_stage("step3_ppo.main", options(world, run, tmp_path / "out", *words), tmp_path)
        assert refused.codes == [2] and part in refused.output

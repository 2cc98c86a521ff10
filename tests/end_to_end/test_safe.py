"""Step 3 with a limit on costs: the script, ranks, ZeRO stages, and resumed runs."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.end_to_end.test_launch import bash
from tests.ranks import run_stage, succeed
from tests.stages import CLOSE, LORA, ZERO, metrics, ppo, timeless

MODULE = "step3_ppo.safe.main"
FUNCTIONS = """
def letter_e(prompts, responses, records):
    return [text.count("e") / 4 - 0.25 for text in responses]

def fails(prompts, responses, records):
    return [1 / 0 for _ in responses]
"""
FIGURES = ("reward/mean", "cost/mean", "cost/lambda", "cost_value/loss", "value/loss", "kl/mean", "eval/cost")


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "costs.py"
    path.write_text(FUNCTIONS)
    return path


def safe(world: Path, run: Path, output: Path, functions: Path, *words: str, steps: int = 3) -> list[str]:
    start = ppo(world, run / "sft/final", run / "reward/final", output, steps)
    return [*start, "--cost_function", f"{functions}:letter_e", "--lambda_rate", "1", *words]


def test_script_writes_models_samples_and_curves(world, run, functions, tmp_path):
    """Through the launcher. The critic of costs starts from the cost model; a reward model gets a warning."""
    cost_model = str(run / "reward/final")
    words = ["--cost_model_name_or_path", cost_model, "--eval_steps", "1", "--num_samples", "2"]
    done = bash("step3_safe.sh", safe(world, run, tmp_path / "out", functions, *words, steps=2), tmp_path)
    assert done.returncode == 0, done.stdout
    assert "cost critic: starts from the cost model" in done.stdout
    assert "not trained with --objective cost" in done.stdout
    for name in ("final", "final_critic", "final_cost_critic"):
        assert (tmp_path / "out" / name / "model.safetensors").exists()
    sample = json.loads((tmp_path / "out/samples.jsonl").read_text().splitlines()[0])
    assert {"score", "cost"} <= sample.keys()
    assert len(metrics(tmp_path / "out", "eval/cost")) == 3
    assert metrics(tmp_path / "out", "policy/ratio") == pytest.approx([1.0] * 2, abs=1e-5)
    rates, costs = metrics(tmp_path / "out", "cost/lambda"), metrics(tmp_path / "out", "cost/mean")
    assert rates[0] == 1.0 and (rates[1] > 1) == (costs[0] > 0)


def test_a_failing_cost_function_is_one_line(world, run, functions, tmp_path):
    words = safe(world, run, tmp_path / "out", functions, "--eval_fraction", "0", steps=1)
    words[words.index("--cost_function") + 1] = f"{functions}:fails"
    result = run_stage(MODULE, words, tmp_path)
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert result.codes == [2] and "--cost_function fails" in line and "ZeroDivisionError" in line


@pytest.mark.rare
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_ranks_and_zero_stages_change_no_number(world, run, functions, tmp_path, zero):
    one, two = tmp_path / "one", tmp_path / "two"
    succeed(MODULE, safe(world, run, one, functions), tmp_path)
    stage = ["--zero_config", str(ZERO / f"zero{zero}.json")]
    succeed(MODULE, safe(world, run, two, functions, *stage), tmp_path, ranks=2)
    for name in FIGURES:
        assert metrics(two, name) == pytest.approx(metrics(one, name), **CLOSE), name


@pytest.mark.rare
@pytest.mark.parametrize("words", [[], LORA, ["--offload_frozen", "--critic_warmup_steps", "1"]], ids=str)
def test_a_run_in_parts_ends_with_the_same_bytes(world, run, functions, tmp_path, words):
    full, parts = tmp_path / "full", tmp_path / "parts"
    words = [*words, "--save_steps", "1", "--lr_scheduler_type", "constant"]
    succeed(MODULE, safe(world, run, full, functions, *words), tmp_path)
    for steps in (1, 2, 3):
        succeed(MODULE, safe(world, run, parts, functions, *words, steps=steps), tmp_path)
    for name in ("final", "final_critic", "final_cost_critic"):
        here, there = (folder / name / "model.safetensors" for folder in (full, parts))
        assert here.read_bytes() == there.read_bytes(), name
        assert load_file(here)
    own = [[line for line in timeless(folder) if "cost/lambda" in line] for folder in (full, parts)]
    assert own[0] == own[1]

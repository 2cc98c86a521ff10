"""Scripts of several steps, which check the options of all steps first, and the report."""

from pathlib import Path

import pytest

from tests.bad_input.commands import contents
from tests.end_to_end.test_launch import bash
from tests.ranks import run_stage

PIPELINE = {"MODEL": "m", "DEMONSTRATIONS": "x", "PREFERENCES": "x", "PROMPTS": "x"}
ROUNDS = {"MODEL": "m", "PROMPTS": "x"}
ONLINE = ROUNDS | {"LABELS": "judge", "JUDGE": "m"}
# Script, words, variables, and a part of the line.
SCRIPTS = [
    ("pipeline.sh", ["--seed", "1" + "0" * 40], PIPELINE, "step1_sft.sh: --seed"),
    ("pipeline.sh", [], PIPELINE | {"STEP2_OPTIONS": "--max_length nan"}, "step2_reward.sh: --max_length"),
    ("pipeline.sh", [], PIPELINE | {"STEP3_OPTIONS": "--timeout_minutes 1e30"}, "step3_ppo.sh: --timeout"),
    (
        "raft.sh",
        ["--seed", "x"],
        ROUNDS | {"STEP1_OPTIONS": "--lora_alpha inf"},
        "step1_sft.sh: --lora_alpha",
    ),
    ("rest.sh", [], ROUNDS | {"EVALUATE_OPTIONS": "--best_of -1"}, "evaluate_ppo.sh: --best_of"),
    ("iterative_dpo.sh", [], ROUNDS | {"DIRECT_OPTIONS": "--beta 1e308"}, "step2_direct.sh: --beta"),
    ("online.sh", ["--temperature", "0"], ONLINE, "sample_pairs.sh: --temperature"),
    ("online.sh", [], ONLINE | {"SHIFT_OPTIONS": "--max_length 1"}, "evaluate_reward.sh: --max_length"),
    (
        "online.sh",
        [],
        ONLINE | {"STEP2_OPTIONS": "--label_smoothing 1"},
        "step2_reward.sh: --label_smoothing",
    ),
    ("online.sh", [], ONLINE | {"STEP3_OPTIONS": "--kl_coef -1"}, "step3_ppo.sh: --kl_coef"),
    ("online.sh", [], ONLINE | {"METHOD": "dpo", "DIRECT_OPTIONS": "--loss no"}, "step2_direct.sh: --loss"),
    ("online.sh", [], ONLINE | {"LABEL_OPTIONS": "--port 0"}, "judge.sh: unknown option --port"),
    (
        "online.sh",
        [],
        ROUNDS | {"LABELS": "gold", "GOLD": "f.py:f", "LABEL_OPTIONS": "--port 0"},
        "LABEL_OPTIONS has no effect with LABELS=gold",
    ),
    ("online.sh", [], ONLINE | {"EVALUATE_OPTIONS": "--best_of -1"}, "evaluate_ppo.sh: --best_of"),
    ("quickstart.sh", ["--num_train_epochs", "1e308"], {}, "step1_sft.sh: --num_train_epochs"),
]
REPORT = {"no word": ([], "OUT"), "two words": (["a", "b"], "b"), "no folder": (["DIR/no"], "DIR/no"),
          "a file": (["DIR/file"], "DIR/file"), "nothing to report": (["DIR"], "DIR")}  # fmt: skip


@pytest.mark.parametrize(("script", "words", "variables", "part"), SCRIPTS)
def test_script_refuses(
    tmp_path: Path, script: str, words: list[str], variables: dict[str, str], part: str
) -> None:
    done = bash(script, words, tmp_path, **variables)
    (line,) = done.stdout.splitlines()
    assert done.returncode == 2 and line.startswith("error: launch/") and part in line, done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", REPORT)
def test_report_refuses(tmp_path: Path, name: str) -> None:
    words, part = REPORT[name]
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    words = [word.replace("DIR", str(tmp_path)) for word in words]
    result = run_stage("launch.report.main", words, tmp_path.with_name(f"{tmp_path.name}_logs"))
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert result.codes == [2] and part.replace("DIR", str(tmp_path)) in line, result.output
    assert contents(tmp_path) == before

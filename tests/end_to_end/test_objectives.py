"""Runs of step 3 with several objectives, through the scripts: scales, and their picture in the report."""

import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tests.ranks import succeed
from tests.stages import metrics, ppo

FUNCTIONS = """
def brief(prompts, responses, records):
    return [-SCALE * len(text) for text in responses]
"""


def bash(script: str, words: list[str], **variables: str) -> None:
    command = ["bash", str(REPOSITORY / "launch" / script), *words]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_runs_with_other_weights(world: Path, run: Path, tmp_path: Path) -> None:
    """The same numbers on two ranks, and with a function that is multiplied by 100."""

    def options(output: str, scale: int, weight: str) -> list[str]:
        file = tmp_path / f"scale_{scale}.py"
        file.write_text(FUNCTIONS.replace("SCALE", str(scale)))
        words = ppo(world, run / "sft/final", run / "reward/final", tmp_path / output, steps=2)
        return [*words, "--normalise_scores", "each", "--reward_function", f"{file}:brief:{weight}"]

    bash("step3_ppo.sh", options("runs/one", 1, "0.5"), NUM_GPUS="2")
    succeed("step3_ppo.main", options("hundred", 100, "0.5"), tmp_path)
    succeed("step3_ppo.main", options("runs/two", 1, "4"), tmp_path)
    one, hundred = tmp_path / "runs/one", tmp_path / "hundred"
    scores = metrics(one, "eval/score")
    assert scores[0] == pytest.approx(0, abs=1e-6), "the scale of its own first responses"
    for name in ("eval/score", "reward/mean", "reward/total", "eval/score_1", "policy/loss"):
        assert metrics(hundred, name) == pytest.approx(metrics(one, name), rel=1e-3, abs=1e-4), name
    by_one, by_hundred = metrics(one, "eval/score_brief"), metrics(hundred, "eval/score_brief")
    assert by_hundred == pytest.approx([100 * score for score in by_one], rel=1e-5)
    weights = [load_file(folder / "final/model.safetensors") for folder in (one, hundred)]
    assert all((weights[0][name] - weight).abs().max() < 1e-4 for name, weight in weights[1].items())
    assert metrics(tmp_path / "runs/two", "policy/loss") != metrics(one, "policy/loss")

    bash("report.sh", [str(tmp_path / "runs")])
    page = (tmp_path / "runs/report.html").read_text()
    assert 'id="objectives"' in page and "Held-out scores of 2 runs" in page
    assert (tmp_path / "runs/report/objectives_0_0.png").stat().st_size > 1000

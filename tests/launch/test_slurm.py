"""Job scripts, with a fake `srun` and `scontrol`."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def submit(folder: Path, script: str, code: int, *words: str) -> tuple[int, list[str]]:
    """Run a job script. Returns its exit code and the commands that it ran."""
    for name, line in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
        (folder / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{folder}/log\n{line}\n')
        (folder / name).chmod(0o755)
    variables = {"MODEL": "m", "DEMONSTRATIONS": "d", "PREFERENCES": "p", "PROMPTS": "q", "OUTPUT": "o"}
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", f"launch/slurm/{script}.sbatch", *words]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **variables, **path}, check=False)
    return done.returncode, (folder / "log").read_text().splitlines()


@pytest.mark.parametrize("step", ["step1_sft", "step2_reward", "step3_ppo", "recipe"])
@pytest.mark.parametrize(("code", "expected"), [(0, []), (1, []), (75, ["scontrol requeue 7"])])
def test_step_returns_to_the_queue_after_a_stop(
    tmp_path: Path, step: str, code: int, expected: list[str]
) -> None:
    name = ["llama_70b"] if step == "recipe" else []
    ended, lines = submit(tmp_path, step, code, *name, "--seed", "1")
    assert ended == code
    script = "recipes/llama_70b" if step == "recipe" else step
    assert lines == [f"srun bash launch/{script}.sh --seed 1", *expected]


@pytest.mark.parametrize(("code", "commands"), [(0, 3), (1, 1), (75, 2)])
def test_chain_ends_at_the_first_step_that_does_not_finish(tmp_path: Path, code: int, commands: int) -> None:
    ended, lines = submit(tmp_path, "pipeline", code)
    assert ended == code and len(lines) == commands
    assert (
        lines[0]
        == "srun bash launch/step1_sft.sh --model_name_or_path m --train_data d --output_dir o/step1_sft"
    )
    assert lines[-1].startswith("scontrol requeue" if code == 75 else "srun")

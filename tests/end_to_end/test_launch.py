"""The bash scripts, with the DeepSpeed launcher, from another working directory."""

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from launch.lib.supervise import Log, ending
from tests.conftest import REPOSITORY
from tests.ranks import run_stage
from tests.stages import (
    metrics,
    sft,
)

LAUNCH = REPOSITORY / "launch"


def bash(script: str, words: list[str], cwd: Path, **variables: str | None) -> subprocess.CompletedProcess:
    """Run a script; a variable that is None is removed."""
    env = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words], cwd=cwd, env=env, timeout=1200,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_ranks_from_another_folder(world: Path, tmp_path: Path) -> None:
    """With a relative output folder, a folder `common` in the working directory, and ZeRO 2 on two ranks."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common/__init__.py").write_text("raise SystemExit('the wrong package')")
    zero = str(LAUNCH.parent / "common/zero_configs/zero2.json")
    done = bash("step1_sft.sh", sft(world, Path("out")), tmp_path, NUM_GPUS="2", ZERO_CONFIG=zero)
    assert done.returncode == 0, done.stdout
    log = (tmp_path / "out/train.log").read_text()
    assert "on 2 ranks" in log
    begin, command, versions, device = log.splitlines()[:4]
    assert begin.startswith("=== 20") and "step1_sft.sh" in command
    assert "--output_dir out " in command
    assert f"torch {torch.__version__}" in versions and device.endswith("2 ranks")
    assert len(metrics(tmp_path / "out", "train/loss")) == 5


def test_hosts_get_the_command_as_it_was_typed(tmp_path: Path) -> None:
    """With a fake `pdsh` that copies the script for the hosts. Without a GPU here, it sets no device."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "pdsh").write_text(
        f'#!/bin/bash\ncommand="${{@: -1}}"; cp "${{command##* }}" {tmp_path}/start.sh\n'
    )
    (tools / "pdsh").chmod(0o755)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    variables = dict.fromkeys(("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"))
    variables |= {"HOSTFILE": "hosts", "PATH": f"{tools}:{os.environ['PATH']}", "ZERO_CONFIG": "z"}
    variables["OMP_WAIT_POLICY"] = "passive"
    words = ["--output_dir", "out", "--model_name_or_path", "$x y", "--train_data", "x"]
    done = bash("step1_sft.sh", words, tmp_path, **variables)
    assert done.returncode == 0, done.stdout
    first, *lines, last = (tmp_path / "start.sh").read_text().splitlines()
    assert first == f"cd {tmp_path} || exit 1"
    assert last == f"exec bash {LAUNCH}/step1_sft.sh {shlex.join(words)}"
    assert {"export OMP_WAIT_POLICY=passive", "export ZERO_CONFIG=z", "export NNODES=2"} <= {*lines}
    assert not any("DS_ACCELERATOR" in line or "OMP_NUM_THREADS" in line for line in lines)


def test_mistake_is_one_line(world: Path, tmp_path: Path) -> None:
    done = bash("step1_sft.sh", [*sft(world, tmp_path / "out"), "--seed", "x"], tmp_path, NUM_GPUS="2")
    assert done.returncode == 2
    assert done.stdout == "error: --seed: invalid int value: 'x'\n"
    assert not (tmp_path / "out").exists()


def test_late_refusal_restores_the_folder(world: Path, tmp_path: Path) -> None:
    """A refusal after the folder was claimed keeps the user's files and removes a new folder."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old/notes.txt").write_text("a note")
    for output in (tmp_path / "old", tmp_path / "new/out"):
        words = [*sft(world, output), "--export_only", "true"]
        result = run_stage("step1_sft.main", words, tmp_path / "logs", ranks=2)
        assert result.codes == [2, 2] and "holds no complete checkpoint" in result.output
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "new").exists()


def test_log_starts_when_the_command_is_accepted(tmp_path: Path) -> None:
    """A resumed run appends to it. A refusal keeps an existing log and creates no new one."""
    accepted, output = tmp_path / "accepted", tmp_path / "a/out"

    def run(*, accepts: bool, refused: bool) -> None:
        log = Log(output, accepted, "bash step.sh --x 'a b'")
        log.write(b"before\n")
        assert accepted.exists() or not log.is_open
        if accepts:
            output.mkdir(parents=True, exist_ok=True)
            accepted.write_text("CPU; 2 ranks")
        log.write(b"after\n")
        log.close(is_refused=refused)
        accepted.unlink(missing_ok=True)

    run(accepts=False, refused=True)
    run(accepts=True, refused=True)
    assert not (tmp_path / "a").exists()
    for _ in range(2):
        run(accepts=True, refused=False)
    run(accepts=False, refused=True)
    lines = (output / "train.log").read_text().splitlines()
    assert lines[1] == "command: bash step.sh --x 'a b'" and lines[3] == "device: CPU; 2 ranks"
    assert lines[4:6] == ["before", "after"] and len(lines) == 12


@pytest.mark.parametrize("new", ["checkpoints", "journal"])
def test_refusal_after_output_was_written_keeps_the_log(tmp_path: Path, new: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    (tmp_path / "accepted").write_text("CPU; 2 ranks")
    for expected in (["notes.txt", "run.lock"], [new, "notes.txt", "run.lock", "train.log"]):
        log = Log(tmp_path / "out", tmp_path / "accepted", "bash step.sh")
        log.write(b"step 1\n")
        (tmp_path / "out/run.lock").touch()
        if new in expected:
            (tmp_path / "out" / new).touch()
        log.close(is_refused=True)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected
    assert "step 1" in (tmp_path / "out/train.log").read_text()


@pytest.mark.parametrize(
    ("notes", "code", "signals", "expected"),
    [
        ({"began_0": "", "began_1": ""}, 0, 0, (0, "")),
        ({"began_0": "", "refused_0": "error: no"}, 2, 0, (2, "error: no\n")),
        ({"began_1": "", "refused_1": "error: its disk"}, 2, 0, (2, "error: its disk\n")),
        (
            {"began_0": "", "began_1": "", "stopped_0": "Stopped.", "stopped_1": "Stopped."},
            75,
            1,
            (75, "Stopped.\n"),
        ),
        ({"began_0": "", "began_1": "", "stopped_1": "Stopped.", "lost_0": "..."}, 1, 1, (75, "Stopped.\n")),
        (
            {},
            -9,
            1,
            (75, "Stopped during preparation; nothing to save. Run the same command to start again.\n"),
        ),
        # The launcher stops the other rank after one was killed: this is a failure, not a stop.
        ({"began_0": "", "began_1": "", "stopped_0": "Stopped."}, -9, 0, (1, "Rank 1 was killed (signal 9)")),
        ({"began_0": "", "began_1": "", "lost_0": "..."}, 1, 0, (1, "Rank 1 was killed (no error message)")),
        (
            {"began_0": "", "lost_0": "...", "began_1": "", "failed_1": "Traceback"},
            1,
            0,
            (1, "The first error:\nTraceback"),
        ),
        ({"began_0": "", "began_1": ""}, -9, 2, (1, "Killed by a second signal")),
        ({}, 1, 0, (1, "")),
    ],
)
def test_exit_code_and_last_line(
    tmp_path: Path, notes: dict[str, str], code: int, signals: int, expected: tuple[int, str]
) -> None:
    """From the notes of the ranks, the launcher's exit code, and the number of signals."""
    for name, text in notes.items():
        (tmp_path / name).write_text(text)
    exit_code, text = ending(tmp_path, code, signals)
    assert exit_code == expected[0] and text.strip("\n").startswith(expected[1].strip("\n"))
    assert bool(text) == bool(expected[1])


@pytest.mark.parametrize(
    ("script", "words", "variables", "parts"),
    [
        ("step1_sft.sh", [], {}, ["--model_name_or_path DIR_OR_HUB_ID --train_data F.jsonl", "--help"]),
        ("best_of_n.sh", [], {}, ["--prompt_data F.jsonl --reward_model_name_or_path OUT2/final"]),
        ("score.sh", [], {}, ["--input F.jsonl"]),
        ("pipeline.sh", [], {"MODEL": "m"}, ["DEMONSTRATIONS"]),
        ("raft.sh", [], {"MODEL": "m"}, ["PROMPTS"]),
        ("recipes/oasst.sh", ["--epochs", "3"], {}, ["--epochs", "--model --data --output"]),
        ("recipes/oasst.sh", ["--model", "m", "--data"], {}, ["--data needs a folder"]),
        ("recipes/stories.sh", ["--model", "m", "--data", "d"], {}, ["--output is required"]),
    ],
)
def test_missing_options_are_one_line(
    tmp_path: Path, script: str, words: list[str], variables: dict[str, str], parts: list[str]
) -> None:
    """Refused before any import, without files on the disk."""
    done = bash(script, words, tmp_path, **variables)
    (line,) = done.stdout.splitlines()
    assert done.returncode == 2 and line.startswith("error: ")
    assert all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())


def test_script_refuses_wrong_options_of_its_last_step(tmp_path: Path) -> None:
    variables = dict.fromkeys(("MODEL", "DEMONSTRATIONS", "PREFERENCES", "PROMPTS"), "x")
    done = bash("pipeline.sh", ["--seed", "1"], tmp_path, STEP3_OPTIONS="--kl_coef -1", **variables)
    assert done.returncode == 2
    assert done.stdout == "error: launch/step3_ppo.sh: --kl_coef -1.0: must be at least 0\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "options", "command"),
    [
        ("raft.sh", "STEP1_OPTIONS", "step1_sft"),
        ("rest.sh", "STEP1_OPTIONS", "step1_sft"),
        ("iterative_dpo.sh", "DIRECT_OPTIONS", "step2_direct"),
    ],
)
def test_rounds_refuse_a_best_metric_without_held_out_data(
    tmp_path: Path, script: str, options: str, command: str
) -> None:
    variables = {options: "--best_metric eval/loss", "MODEL": "x", "PROMPTS": "x"}
    done = bash(script, ["--reward_model_name_or_path", "x"], tmp_path, **variables)
    assert done.returncode == 2
    assert done.stdout.startswith(f"error: launch/{command}.sh: --best_metric eval/loss: needs held-out data")
    assert not list(tmp_path.iterdir())


def test_short_quickstart(tmp_path: Path) -> None:
    """The quickstart with two steps per stage."""
    done = bash("quickstart.sh", ["--max_steps", "2"], tmp_path, OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {"gold_sft", "gold_ppo", "gold_win_rate", "reward_accuracy", "kl", "seconds"} <= report.keys()
    assert (tmp_path / "out/report.png").stat().st_size > 10_000
    for stage in ("step1_sft", "step2_reward", "step3_ppo"):
        assert report["seconds"][stage] > 0
        assert (tmp_path / "out" / stage / "final/config.json").exists()


def test_pipeline_runs_all_stages(world: Path, tmp_path: Path) -> None:
    words = [
        "--max_steps",
        "1",
        "--global_batch_size",
        "4",
        "--micro_batch_size",
        "4",
        "--max_eval_samples",
        "4",
    ]
    done = bash(
        "pipeline.sh", words, tmp_path, MODEL=str(world / "model"), OUTPUT=str(tmp_path / "out"),
        DEMONSTRATIONS=str(world / "demonstrations.jsonl"), PREFERENCES=str(world / "preferences.jsonl"),
        PROMPTS=str(world / "prompts.jsonl"), STEP3_OPTIONS="--rollout_batch_size 4 --max_response_length 4",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out/step3_ppo/final/model.safetensors").exists()


def test_signal_during_the_last_training_step_stops_the_script(tmp_path: Path) -> None:
    """The run finishes with exit code 0, but the script starts no further step and exits with 75."""
    (tmp_path / "run.sh").write_text("trap 'echo asked' TERM\necho begun\nsleep 1 & wait || wait\nexit 0")
    (tmp_path / "inner.sh").write_text(
        f"set -euo pipefail\nsource {LAUNCH}/lib/environment.sh\nstep {tmp_path}/run.sh\necho continued"
    )
    outer = (tmp_path / "inner.sh").read_text().replace("run.sh", "inner.sh")
    for signals in (1, 0):
        with subprocess.Popen(["bash", "-c", outer], stdout=subprocess.PIPE, text=True) as running:
            output = running.stdout.readline()
            for _ in range(signals):
                running.send_signal(signal.SIGTERM)
            output += running.stdout.read()
        expected = (75, "begun\nasked\n") if signals else (0, "begun\ncontinued\ncontinued\n")
        assert (running.returncode, output) == expected

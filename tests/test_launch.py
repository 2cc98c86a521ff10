"""The bash scripts, through the real DeepSpeed launcher, from another working directory."""

import json
import os
import signal
import subprocess
from pathlib import Path

from tests.test_stages import metrics, sft, world  # noqa: F401 - world is a fixture

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


def bash(script: str, words: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words], cwd=cwd, env={**os.environ, **variables}, timeout=1200,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_ranks_from_another_folder(world: Path, tmp_path: Path) -> None:  # noqa: F811
    """A relative output folder, a folder named like one of ours beside it, and ZeRO 2 on two ranks."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common/__init__.py").write_text("raise SystemExit('the wrong package')")
    zero = str(LAUNCH.parent / "common/zero_configs/zero2.json")
    done = bash("step1_sft.sh", sft(world, Path("out")), tmp_path, NUM_GPUS="2", ZERO_CONFIG=zero)
    assert done.returncode == 0, done.stdout
    assert "on 2 ranks" in (tmp_path / "out/train.log").read_text()
    assert len(metrics(tmp_path / "out", "train/loss")) == 5


def test_a_mistake_is_visible(world: Path, tmp_path: Path) -> None:  # noqa: F811
    done = bash("step1_sft.sh", [*sft(world, tmp_path / "out"), "--seed", "x"], tmp_path, NUM_GPUS="2")
    assert done.returncode == 2
    assert done.stdout.count("error:") == 1 and "--seed" in done.stdout


def test_quickstart_in_small(tmp_path: Path) -> None:
    """The quickstart with two steps a stage: everything but the learning."""
    done = bash("quickstart.sh", ["--max_steps", "2"], tmp_path, OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {"gold_sft", "gold_ppo", "gold_win_rate", "reward_accuracy", "kl", "seconds"} <= report.keys()
    assert (tmp_path / "out/report.png").stat().st_size > 10_000
    for stage in ("step1_sft", "step2_reward", "step3_ppo"):
        assert report["seconds"][stage] > 0
        assert (tmp_path / "out" / stage / "final/config.json").exists()


def test_pipeline_chains_the_stages(world: Path, tmp_path: Path) -> None:  # noqa: F811
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


def test_a_signal_in_the_last_step_of_a_run_ends_the_scripts_too(tmp_path: Path) -> None:
    """A run that is done ends with 0; what would come after it does not begin."""
    (tmp_path / "run.sh").write_text("trap 'echo asked' TERM\necho begun\nsleep 1 & wait || wait\nexit 0")
    (tmp_path / "inner.sh").write_text(
        f"set -euo pipefail\nsource {LAUNCH}/environment.sh\nstep {tmp_path}/run.sh\necho went on"
    )
    outer = (tmp_path / "inner.sh").read_text().replace("run.sh", "inner.sh")
    for signals in (1, 0):
        with subprocess.Popen(["bash", "-c", outer], stdout=subprocess.PIPE, text=True) as running:
            said = running.stdout.readline()
            for _ in range(signals):
                running.send_signal(signal.SIGTERM)
            said += running.stdout.read()
        expected = (75, "begun\nasked\n") if signals else (0, "begun\nwent on\nwent on\n")
        assert (running.returncode, said) == expected

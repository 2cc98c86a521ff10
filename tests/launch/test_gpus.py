"""Which GPUs the ranks of a machine use."""

import base64
import json
import os
import subprocess
from pathlib import Path

import pytest
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from launch.lib.gpus import choose, choose_part
from tests.conftest import REPOSITORY

UUIDS = ["GPU-aa11", "GPU-ab22", "GPU-cc33", "GPU-dd44"]


@pytest.mark.parametrize(
    ("number", "visible", "chosen"),
    [
        ("", None, [0, 1, 2, 3]),
        ("2", None, [0, 1]),
        ("", "2,3", [2, 3]),
        ("1", "3,1", [3]),
        ("", "GPU-cc33, GPU-aa", [2, 0]),
    ],
)
def test_choice(number: str, visible: str | None, chosen: list[int]) -> None:
    assert choose(number, visible, UUIDS) == chosen


@pytest.mark.parametrize(
    ("number", "visible", "message"),
    [
        ("5", None, "NUM_GPUS 5: must be from 1 to 4"),
        ("3", "0,1", "NUM_GPUS 3: must be from 1 to 2"),
        ("0", None, "NUM_GPUS 0"),
        ("two", None, "NUM_GPUS two"),
        ("", "7", "CUDA_VISIBLE_DEVICES 7: no such GPU"),
        ("", "GPU-a", "CUDA_VISIBLE_DEVICES GPU-a: no such GPU"),
        ("", "MIG-1", "CUDA_VISIBLE_DEVICES MIG-1: no such GPU"),
        ("", "", "hides all GPUs"),
    ],
)
def test_refusal(number: str, visible: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(number, visible, UUIDS)


@pytest.mark.parametrize(("number", "visible"), [("", "MIG-ab"), ("1", " MIG-ab,MIG-cd"), ("1", "MIG-ab")])
def test_part_of_a_gpu(number: str, visible: str) -> None:
    assert choose_part(number, visible) == "MIG-ab"


@pytest.mark.parametrize(
    ("number", "visible", "message"),
    [
        ("2", "MIG-ab,MIG-cd", "CUDA_VISIBLE_DEVICES MIG-ab,MIG-cd: a run uses one MIG device, or GPUs"),
        ("", "0,MIG-ab", "CUDA_VISIBLE_DEVICES 0,MIG-ab: a run uses one MIG device, or GPUs"),
        ("", "MIG-ab,MIG-cd", "CUDA_VISIBLE_DEVICES names 2 MIG devices, and CUDA gives a process one"),
    ],
)
def test_refused_parts(number: str, visible: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_part(number, visible)


def sourced(lines: str, **variables: str) -> str:
    """What lines of bash print after the functions of the launch scripts are read."""
    lines = f"source {REPOSITORY}/launch/lib/environment.sh; {lines}"
    environment = {**os.environ, **variables}
    return subprocess.run(
        ["bash", "-c", lines], env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.end_to_end
def test_the_launcher_gets_the_name_of_a_part() -> None:
    """`deepspeed` takes numbers only; the program that it starts takes names."""
    words = sourced(
        'GPUS=MIG-ab NUM_GPUS=1 NNODES=1; choose_launcher; printf "%s\\n" "${LAUNCHER[@]}"'
    ).split()
    assert words[:4] == ["python", "-u", "-m", "deepspeed.launcher.launch"]
    world = base64.urlsafe_b64decode(words[words.index("--world_info") + 1])
    assert json.loads(world) == {"node0": ["MIG-ab"]}
    environment: dict[str, str] = {}
    CUDA_Accelerator().set_visible_devices_envs(environment, json.loads(world)["node0"])
    assert environment == {"CUDA_VISIBLE_DEVICES": "MIG-ab"}


@pytest.mark.end_to_end
@pytest.mark.parametrize(("chosen", "visible"), [("2", "2"), ("MIG-ab", "MIG-ab"), ("", "unset")])
def test_a_tool_runs_on_the_chosen_gpu(tmp_path: Path, chosen: str, visible: str) -> None:
    (tmp_path / "python").write_text("#!/bin/bash\necho ${CUDA_VISIBLE_DEVICES-unset}\n")
    (tmp_path / "python").chmod(0o755)
    stubs = "install() { :; }; check_options() { :; }; "
    stubs += f"choose_device() {{ GPUS={chosen}; unset CUDA_VISIBLE_DEVICES; }}"
    out = sourced(f"{stubs}; run_alone module", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert out == f"{visible}\n"


@pytest.mark.end_to_end
def test_gpus_that_torch_cannot_use_are_an_error(tmp_path: Path) -> None:
    """As with an old driver. Nothing is written, and DS_ACCELERATOR=cpu is the way out."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\necho GPU 0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}
    del environment["DS_ACCELERATOR"]
    words = [
        "--model_name_or_path",
        str(tmp_path),
        "--train_data",
        "x",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    command = ["bash", str(REPOSITORY / "launch/step1_sft.sh"), *words]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert refused.stderr.startswith("error: this machine has GPUs, but torch cannot use them: torch ")
    assert "DS_ACCELERATOR=cpu" in refused.stderr and len(refused.stderr.splitlines()) == 1
    environment["DS_ACCELERATOR"] = "cpu"
    accepted = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (
        accepted.stdout + accepted.stderr
        == f"error: {tmp_path}: not a model folder: config.json is missing\n"
    )

"""Ranks that share rows: the numbers of one rank, at any ZeRO stage, resumed with another number of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.test_families import COMPLETE, make_model
from tests.end_to_end.test_launch import bash
from tests.ranks import run_stage, succeed
from tests.stages import LORA, ZERO, metrics, sft

NAMES = ["train/loss", "train/grad_norm", "eval/loss"]
STABLE = [
    "--adam_epsilon", "1e-3", "--num_samples", "2", "--lr_scheduler_type", "constant", "--warmup_ratio", "0",
]  # fmt: skip


def words(world: Path, output: Path, shared: int, *more: str, steps: int = 2) -> list[str]:
    return [*sft(world, output, steps), *STABLE, "--sequence_parallel", str(shared), *more]


def assert_same(output: Path, expected: Path) -> None:
    for name in NAMES:
        values = metrics(output, name)
        assert values and values == pytest.approx(metrics(expected, name), rel=1e-5, abs=1e-6), name
    one, other = (load_file(folder / "final/model.safetensors") for folder in (expected, output))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-5)
    configs = [(folder / "final/config.json").read_text() for folder in (output, expected)]
    assert configs[0] == configs[1]


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "out"
    succeed("step1_sft.main", words(world, output, 1), output.parent)
    return output


@pytest.mark.parametrize(
    ("ranks", "shared", "more"),
    [
        (2, 2, ["--zero_config", f"{ZERO}/zero0.json"]),
        (2, 2, ["--zero_config", f"{ZERO}/zero3.json", "--gradient_checkpointing"]),
        (4, 2, ["--zero_config", f"{ZERO}/zero2.json", "--micro_batch_tokens", "200"]),
    ],
)
def test_sft(world: Path, alone: Path, tmp_path: Path, ranks: int, shared: int, more: list[str]) -> None:
    succeed("step1_sft.main", words(world, tmp_path / "out", shared, *more), tmp_path, ranks)
    assert_same(tmp_path / "out", alone)


def test_resumed_with_other_groups(world: Path, alone: Path, tmp_path: Path) -> None:
    """A step on two ranks that share rows, through the script, then one on two that do not."""
    first, second = (
        words(world, tmp_path / "out", shared, "--save_steps", "1", steps=steps)
        for steps, shared in ((1, 2), (2, 1))
    )
    done = bash("step1_sft.sh", first, tmp_path, NUM_GPUS="2")
    assert done.returncode == 0, done.stdout
    succeed("step1_sft.main", second, tmp_path, ranks=2)
    assert metrics(tmp_path / "out", "train/loss") == pytest.approx(metrics(alone, "train/loss"), rel=1e-5)


@pytest.mark.rare
def test_adapters(world: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        options = words(world, tmp_path / f"{ranks}", ranks, *LORA)
        succeed("step1_sft.main", options, tmp_path, ranks)
    assert_same(tmp_path / "2", tmp_path / "1")


def test_model_with_attention_of_its_own_is_refused(world: Path, tmp_path: Path) -> None:
    make_model(world, tmp_path, COMPLETE["bloom"])
    result = run_stage("step1_sft.main", words(tmp_path, tmp_path / "out", 2), tmp_path, ranks=2)
    assert result.codes == [2, 2]
    assert "--sequence_parallel 2: not for a model of type 'bloom'" in result.output.splitlines()[-1]
    assert not (tmp_path / "out/final").exists()

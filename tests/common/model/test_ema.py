"""EMA weights average the optimiser's fp32 weights, whatever the precision and the partitions."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

from tests.ranks import succeed
from tests.stages import ZERO, ppo

DECAY, STEPS = 0.7, 3


def train(world: Path, run: Path, output: Path, zero: Path, ranks: int, steps: int = STEPS) -> None:
    words = [
        *ppo(world, run / "sft/final", run / "reward/final", output, steps), "--zero_config", str(zero),
        "--ema_decay", str(DECAY), "--save_steps", "1", "--save_total_limit", "0", "--eval_fraction", "0",
        "--lr_scheduler_type", "constant",
    ]  # fmt: skip
    succeed("step3_ppo.main", words, output.parent, ranks)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 2), pytest.param(3, 2, marks=pytest.mark.rare)])
def test_average_is_that_of_the_fp32_weights_in_bf16(
    world: Path, run: Path, tmp_path: Path, stage: int, ranks: int
) -> None:
    """Recomputed from the fp32 weights in the checkpoints; a stop after a step changes nothing."""
    zero = json.loads((ZERO / f"zero{stage}.json").read_text()) | {"bf16": {"enabled": True}}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    train(world, run, tmp_path / "run", tmp_path / "zero.json", ranks)
    folders = [tmp_path / f"run/checkpoints/step_{step:06}" for step in range(1, STEPS + 1)]
    steps = [get_fp32_state_dict_from_zero_checkpoint(folder, tag="actor") for folder in folders]
    average = load_file(folders[-1] / "average.safetensors")
    assert average.keys() <= steps[0].keys()
    differs = False
    for name, tensor in average.items():
        expected = steps[0][name].double()
        for weights in steps[1:]:
            expected = DECAY * expected + (1 - DECAY) * weights[name].double()
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
        differs |= not torch.equal(steps[-1][name], steps[-1][name].bfloat16().float())
    assert differs, "the fp32 weights have no more digits than their copies"

    for steps_so_far in (2, STEPS):
        train(world, run, tmp_path / "resumed", tmp_path / "zero.json", ranks, steps_so_far)
    resumed = tmp_path / f"resumed/checkpoints/step_{STEPS:06}/average.safetensors"
    assert resumed.read_bytes() == (folders[-1] / "average.safetensors").read_bytes()
    files = [tmp_path / run / "final_ema/model.safetensors" for run in ("run", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()

"""AdamW of bitsandbytes: the same steps as torch's, and refusals. Paging itself needs a GPU: `tests/gpu/`."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.model import deepspeed_check
from common.model.zero import load_zero_config
from common.runtime.options import OptimiserOptions, UserError
from tests.conftest import assert_close
from tests.ranks import succeed
from tests.stages import ZERO, sft

PAGED = OptimiserOptions(global_batch_size=2, micro_batch_size=2, paged_adamw=True)


@pytest.mark.parametrize(
    ("stage", "ranks"), [(1, 2), *(pytest.param(stage, 1, marks=pytest.mark.rare) for stage in (0, 2))]
)
def test_steps_are_those_of_torch(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, ranks: int
) -> None:
    """As if there were a GPU; a run that stops after two steps and resumes ends with the same bytes."""
    pytest.importorskip("bitsandbytes", reason="needs common/model/requirements-qlora.txt")
    monkeypatch.setattr(deepspeed_check, "on_cpu", lambda: False)

    def train(name: str, steps: int, *words: str) -> None:
        words = *words, "--zero_config", str(ZERO / f"zero{stage}.json"), "--weight_decay", "0.3"
        words = *words, "--lr_scheduler_type", "constant", "--eval_fraction", "0", "--save_steps", "2"
        succeed("step1_sft.main", [*sft(world, tmp_path / name, steps), *words], tmp_path, ranks)

    train("torch", 4)
    train("paged", 4, "--paged_adamw")
    for steps in (2, 4):
        train("resumed", steps, "--paged_adamw")
    files = [tmp_path / name / "final/model.safetensors" for name in ("torch", "paged", "resumed")]
    assert files[1].read_bytes() == files[2].read_bytes()
    expected, weights, start = map(load_file, (*files[:2], world / "model/model.safetensors"))
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
        assert (weight - start[name]).abs().max() > 1e-3, name
    assert files[0].read_bytes() != files[1].read_bytes(), "the same optimiser"


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(UserError, match="^--paged_adamw: needs an NVIDIA GPU"):
        load_zero_config(str(ZERO / "zero2.json"), PAGED, 1e-2)


@pytest.mark.parametrize("name", ["zero3", "zero2_offload"])
def test_where_deepspeed_moves_the_moments_it_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(deepspeed_check, "on_cpu", lambda: False)
    with pytest.raises(UserError, match="^--paged_adamw: allowed: ZeRO stage 0, 1 or 2 without"):
        load_zero_config(str(ZERO / f"{name}.json"), PAGED, 1e-2)

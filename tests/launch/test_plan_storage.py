"""The plan of host memory and disk space."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.runtime.files import folder_bytes
from launch.plan import memory
from launch.plan.main import storage_table
from launch.plan.memory import Model, Parts, Zero
from launch.plan.options import PlanOptions
from launch.plan.phases import step3
from launch.plan.predict import GIB, predict, predict_storage
from launch.plan.shapes import read_shape
from launch.plan.storage import Storage, checkpoint, of_machine, on_disk, storage
from tests.launch.test_plan import LLAMA_2_7B, PARAMETERS_OF_LLAMA_2_7B, SIZES, plain, written
from tests.ranks import succeed
from tests.stages import ZERO, make_world, sft


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanOptions:
    """Llama 2 7B on 16 GPUs, 8 of them on a machine."""
    monkeypatch.setenv("WORLD_SIZE", "16")
    return PlanOptions(num_gpus=16, model_name_or_path=written(LLAMA_2_7B, tmp_path / "llama"))


def test_pinned_memory_is_a_power_of_two() -> None:
    assert [memory.pinned(size) for size in (0, 1, 3, 4096, 4097)] == [0, 1, 4, 4096, 8192]


@pytest.mark.parametrize(
    ("stage", "host"), [(1, 4096 + 2048 + 4096 + 2048), (2, 12288), (3, 4000 + 4096 + 2048)]
)
def test_offloaded_optimiser_by_hand(stage: int, host: int) -> None:
    """1000 weights on each of 2 ranks: 8000 bytes of moments, and what DeepSpeed copies and pins."""
    model = Model(plain(2000), Zero(stage, ranks=2, offloads_optimiser=True))
    assert memory.optimiser(model) == Parts(host=8000 + host)


def test_partitions_are_pinned_one_by_one() -> None:
    """Frozen: each tensor's half. Trained: another buffer for all."""
    shape = replace(plain(700), tensors=(600, 100))
    zero = Zero(3, ranks=2, offloads_weights=True)
    assert memory.weights(Model(replace(shape, trained=0), zero)) == Parts(host=1024 + 128)
    assert memory.weights(Model(shape, zero)) == Parts(host=1024 + 128 + 1024)


def test_weights_of_frozen_models_are_pinned_without_rounding(big: PlanOptions) -> None:
    host = predict(replace(big, offload_frozen=True))["step 3"].parts["host"]
    reward = read_shape(big.model_name_or_path, True, 0, ()).parameters
    assert host == 2 * (PARAMETERS_OF_LLAMA_2_7B + reward)


def test_host_memory_is_that_of_all_phases(big: PlanOptions) -> None:
    """The states of the optimiser are there in rollouts only, and the peak may be in an update."""
    options = replace(
        big, offload_states=True, offload_frozen=True, micro_batch_size=2, max_prompt_length=2048
    )
    peak, away = predict(options)["step 3"], 0.0
    for is_scalar in (False, True):
        trained = read_shape(big.model_name_or_path, is_scalar, 0, ()).parameters
        away += 3 * memory.pinned(4 * trained / 16)
    assert peak.name not in ("rollout", "scoring")
    without = predict(replace(options, offload_states=False))["step 3"].parts["host"]
    assert peak.parts["host"] == without + away


def test_storage_by_hand() -> None:
    """Weights, fp32 copies and two moments; the average is the first model's."""
    actor, critic = Model(plain(1000), Zero(2, ranks=2)), Model(plain(500), Zero(3, ranks=2))
    assert [checkpoint(model) for model in (actor, critic)] == [1000 * (2 + 4 + 8), 500 * (4 + 8)]
    assert checkpoint(Model(plain(1000), Zero(0, 1, size=4))) == 1000 * (4 + 8)
    assert checkpoint(Model(plain(1000, trained=10), Zero(2, 2))) == 10 * (2 + 4 + 8)
    assert storage([actor, critic]) == Storage(2000, 14_000 + 6000, 3000)
    assert storage([actor, critic], has_ema=True) == Storage(4000 + 2 * 2000, 20_000 + 4000, 5000)
    assert of_machine(per_rank=70, ranks=8, exporting=9) == 569
    assert on_disk(Storage(0, 100, 30), limit=2) == 3 * 100 + 30


def test_table_of_host_memory_and_disk(big: PlanOptions) -> None:
    options = replace(big, offload_frozen=True)
    peaks, needs = predict(options), predict_storage(options)["step 3"]
    head, per_rank, host, one, disk = storage_table(options, peaks).splitlines()
    assert head.split() == ["GiB", "step", "1", "step", "2", "step", "3"]
    assert host.startswith("host of 8 ranks ")
    cells = [line.split()[-1] for line in (per_rank, host, one, disk)]
    rank = peaks["step 3"].parts["host"]
    sizes = rank, 8 * rank + needs.exporting, needs.checkpoint, 3 * needs.checkpoint + needs.final
    assert cells == [f"{size / GIB:.2f}" for size in sizes]
    assert storage_table(replace(options, save_total_limit=0), peaks).endswith("all are kept")


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "bf16")])
def test_checkpoint_has_the_planned_size(tmp_path: Path, stage: int, precision: str) -> None:
    world = make_world(tmp_path / "world", hidden_size=128)
    config = json.loads((ZERO / f"zero{stage}.json").read_text())
    if stage:
        config["bf16"] = {"enabled": precision == "bf16"}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    options = [*sft(world, tmp_path / "out", 1), "--zero_config", str(tmp_path / "zero.json")]
    succeed("step1_sft.main", [*options, "--num_samples", "0", "--save_steps", "1"], tmp_path, ranks=2)
    size = folder_bytes(tmp_path / "out/checkpoints/step_000001")
    shape = read_shape(str(world / "model"), False, 0, ())
    planned = checkpoint(Model(shape, Zero(stage, ranks=2, size=4 if precision == "fp32" else 2)))
    assert planned == pytest.approx(size, rel=0.05)


def test_vllm_stays_in_memory_on_a_cpu_but_for_its_passes() -> None:
    """Its weights and cache are there in updates too, its activations and logits are not."""
    model = Model(plain(1000, vocabulary=10, mlp=4, hidden=2), Zero(2, 2, on_cpu=True))
    rollout, *_, update = step3(
        model, None, model, [], replace(SIZES, engine_ranks=2, engine_cache=70), Parts()
    )
    assert rollout.parts["KV cache"] == update.parts["KV cache"] == 70
    assert rollout.parts["activations"] and not update.parts["activations"]

"""DeepSpeed JSONs that DeepSpeed, its parser or its first step would refuse, over all commands with one."""

from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from tests.bad_input.commands import READS_ZERO, check_refusal

DEEP = b'{"aio": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
NESTED = b'{"aio": ' + b'{"a": ' * 900 + b"1" + b"}" * 900 + b"}"


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **settings}}


def stage1(**sections: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 1}, **sections}


# Content of the file, and a part of the line.
REFUSED = [
    # precision
    (stage1(bf16={"enabled": True}, fp16={"enabled": True}), "bfloat16 and fp16"),
    (stage1(bf16=[]), "bf16 is []"),
    (stage1(bf16={"enabled": "maybe"}), "enabled is 'maybe'"),
    (stage1(bf16={"enabled": False, "on": 1}), "on is 1"),
    (stage1(fp16={"enabled": True, "loss_scale": "big"}), "loss_scale is 'big'"),
    (stage1(fp16={"enabled": True, "loss_scale": -5}), "loss_scale is -5"),
    (stage1(fp16={"enabled": True, "loss_scale_window": 1.5}), "loss_scale_window is 1.5"),
    (stage1(torch_autocast={"enabled": True, "dtype": "float99"}), "float99"),
    (stage1(communication_data_type="fp13"), "fp13"),
    (stage1(data_types="fp13"), "'str' object"),
    # ZeRO
    ({"zero_optimization": None}, "zero_optimization is None"),
    (zero(stage=True), "stage is True"),
    (zero(stage=2.0), "stage is 2.0"),
    (zero(overlap=True), "overlap is True"),
    (zero(reduce_bucket_size=-1), "reduce_bucket_size is -1"),
    (zero(reduce_bucket_size="large"), "reduce_bucket_size is 'large'"),
    (zero(reduce_bucket_size=10**40), "reduce_bucket_size is 1"),
    (zero(reduce_bucket_size=float("nan")), "reduce_bucket_size is nan"),
    (zero(allgather_bucket_size=[1]), "allgather_bucket_size is [1]"),
    (zero(overlap_comm="perhaps"), "overlap_comm is 'perhaps'"),
    (zero(stage=3, stage3_max_live_parameters="many"), "stage3_max_live_parameters is 'many'"),
    (zero(stage=3, mics_shard_size=2), "MiCS"),
    (zero(offload_optimizer={"device": "cpu", "pin": 1}), "offload_optimizer.pin is 1"),
    (zero(offload_optimizer={"device": True}), "offload_optimizer"),
    (zero(offload_optimizer={"device": "nvme"}), "nvme_path"),
    # other sections
    (stage1(optimizer=None), "optimizer is None"),
    (stage1(optimizer={"type": "AdamW", "params": {"betas": 5}}), "optimizer.params.betas is 5"),
    (stage1(scheduler=[]), "scheduler is []"),
    (stage1(activation_checkpointing={"number_checkpoints": "x"}), "number_checkpoints is 'x'"),
    (stage1(flops_profiler={"output_file": 3}), "output_file is 3"),
    (stage1(scheduler={"type": "Nope"}), "scheduler.type is 'Nope'"),
    (stage1(wandb={"enabled": True}), "wandb needs the package wandb"),
    (stage1(comet={"enabled": True}), "comet needs the package comet_ml"),
    (stage1(wandb=[1]), "wandb is [1]"),
    (stage1(tensorboard={"enabled": True, "output_path": 5}), "tensorboard.output_path is 5"),
    (stage1(csv_monitor={"enabled": "yes please"}), "csv_monitor.enabled is 'yes please'"),
    (stage1(flops_profiler=5), "'int' object"),
    (stage1(flops_profiler={"profile_step": "one"}), "flops_profiler.profile_step is 'one'"),
    (stage1(flops_profiler={"steps": 1}), "'flops_profiler.steps'; allowed: "),
    (stage1(comms_logger="on"), "must be a mapping"),
    (stage1(aio={"block_size": "x"}), "aio.block_size is 'x'"),
    (stage1(aio={"block": 1}), "'aio.block'"),
    (stage1(activation_checkpointing={"profile": 1}), "activation_checkpointing.profile is 1"),
    (stage1(compile={"backend": "x"}), "backend is 'x'"),
    (stage1(checkpoint={"tag_validation": "x"}), "tag_validation"),
    (stage1(checkpoint={"writer": {"type": "x"}}), "writer"),
    (stage1(amp={"enabled": True}), "removed"),
    (stage1(sparse_gradients=True), "removed"),
    (stage1(elasticity={"enabled": True}), "unknown key 'elasticity'"),
    # single values
    (stage1(steps_per_print=0), "steps_per_print is 0"),
    (stage1(gradient_predivide_factor=0), "gradient_predivide_factor is 0"),
    (stage1(gradient_allreduce_op="x"), "gradient_allreduce_op"),
    (stage1(prescale_gradients="x"), "prescale_gradients is 'x'"),
    (stage1(wall_clock_breakdown="x"), "'str' and 'bool'"),
    (stage1(dump_state=7), "dump_state is 7"),
    # the file
    (bytes(range(256)), "not UTF-8 text"),
    ("{}".encode("utf-16"), "not UTF-8 text"),
    (b"", "not valid JSON"),
    (b"null", "must hold one JSON object"),
    (b'{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' is there twice"),
    (b'{"zero_optimization": {}, "zero_optimization": {"stage": 2}}', "'zero_optimization' is there twice"),
    (DEEP, "nested too deep"),
    (NESTED, "nested too deep"),
    (b'{"zero_optimization": {"stage": ' + b"1" * 5000 + b"}}", "thousands of digits"),
]  # fmt: skip
# What DeepSpeed refuses only on this device, or when it starts.
REFUSED_LATE = [
    (stage1(fp16={"enabled": True}), "fp16 is not supported"),
    (stage1(data_types={"grad_accum_dtype": "fp13"}), "fp13"),
    (stage1(csv_monitor={"enabled": True, "output_path": "/dev/null"}), "/dev/null"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_file_is_refused(models: Path, tmp_path: Path, number: int) -> None:
    content, part = REFUSED[number]
    words, parts = ["--zero_config", "DIR/zero.json"], ["DIR/zero.json:", part]
    command = READS_ZERO[number % len(READS_ZERO)]
    check_refusal(command, words, parts, models, tmp_path, {"zero.json": content})


@pytest.mark.parametrize(("content", "part"), REFUSED_LATE)
def test_engine_is_refused(models: Path, tmp_path: Path, content: dict[str, Any], part: str) -> None:
    if "fp16" in content and get_accelerator().is_fp16_supported():
        pytest.skip("this CPU computes in fp16")
    words = ["--zero_config", "DIR/zero.json"]
    check_refusal("step1_sft", words, ["--zero_config", part], models, tmp_path, {"zero.json": content})


@pytest.mark.parametrize("path", ["/dev/null", "/", "DIR/no.json", "DIR/" + "x" * 300, "\0"])
def test_path_is_refused(models: Path, tmp_path: Path, path: str) -> None:
    check_refusal("step2_reward", ["--zero_config", path], [], models, tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (zero(stage=0), "the actor is at ZeRO stage 0; allowed: stage 1 or 2"),
        (zero(stage=3), "the actor is at ZeRO stage 3; allowed: stage 1 or 2"),
        (zero(offload_optimizer={"device": "cpu"}), "has offload_optimizer"),
    ],
)
def test_states_that_cannot_move_are_refused(
    models: Path, tmp_path: Path, content: dict[str, Any], part: str
) -> None:
    words = ["--zero_config", "DIR/zero.json", "--offload_states"]
    files = {"zero.json": content}
    check_refusal("step3_ppo", words, ["--offload_states:", part], models, tmp_path, files)

"""Precision of an engine: the same on all ranks, and fp32 for sums of many gradients."""

from typing import Any

from common.model.zero import offloads
from common.runtime.distributed import gather_objects, log_once
from common.runtime.option_checks import rows_per_micro_batch
from common.runtime.options import OptimiserOptions, UserError
from common.runtime.row_groups import data_ranks

# In bf16 the relative error of the sum is 0.2 % for 1 micro-batch, 0.5 % for 16 and 0.8 % for 64.
MANY = 32


def check_same_precision(zero: dict[str, Any]) -> None:
    """Raise UserError, on all ranks, where "auto" is bf16 on some GPUs of a run and fp32 on others."""
    if len({str(config) for config in gather_objects(zero.get("bf16"))}) > 1:
        raise UserError(
            'the DeepSpeed JSON has bf16 "auto", and only some GPUs of this run compute in bf16: use GPUs of'
            " one kind, or set bf16 or fp16 in the JSON"
        )


def needs_fp32_sums(zero: dict[str, Any], options: OptimiserOptions) -> bool:
    """Whether gradients in 16 bits have to be summed in fp32, at 2 more bytes per element.

    Not with --micro_batch_tokens, whose number of micro-batches varies; not at stage 1, where DeepSpeed would
    take another optimiser with other checkpoints; and not with an offloaded optimiser at stage 2, where it
    sums in 16 bits anyway.
    """
    stage = zero["zero_optimization"]["stage"]
    if options.micro_batch_tokens or stage < 2 or (stage == 2 and offloads(zero, "offload_optimizer")):
        return False
    return _micro_batches(options) >= MANY


def choose_sums(zero: dict[str, Any], options: OptimiserOptions) -> None:
    """Set `data_types.grad_accum_dtype` to fp32 where that is needed, unless the JSON sets it."""
    is_16_bit = any(zero.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    types = zero.setdefault("data_types", {})
    if is_16_bit and types.get("grad_accum_dtype") is None and needs_fp32_sums(zero, options):
        types["grad_accum_dtype"] = "fp32"
        log_once(f"the gradients of {_micro_batches(options)} micro-batches are summed in fp32")


def _micro_batches(options: OptimiserOptions) -> int:
    """Of one optimiser step, on each rank."""
    return options.global_batch_size // (rows_per_micro_batch(options) * data_ranks())

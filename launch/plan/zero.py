"""ZeRO settings of the planned models, from DeepSpeed's JSON."""

import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from common.model.precision import needs_fp32_sums
from common.model.zero import CONFIG_FOLDER, fill_bucket_sizes, load_zero_config, offloads
from common.runtime.options import OptimiserOptions, world_size
from launch.plan.memory import ALLREDUCE_BUCKET, FP32, Zero
from launch.plan.options import PlanOptions


def frozen(trained: Zero, offload: bool) -> Zero:
    """ZeRO settings of a frozen model, derived from those of a trained one."""
    return replace(trained, offloads_weights=trained.offloads_weights or offload)


def read_zero(path: str, options: PlanOptions, learning_rate: float, hidden: int) -> Zero:
    """ZeRO settings from a DeepSpeed JSON, or from the default one of the planned device."""
    settings = tuple((field.name, getattr(options, field.name)) for field in fields(OptimiserOptions))
    return _read_zero(path, options.device == "cpu", settings, learning_rate, hidden, world_size())


@cache
def _read_zero(
    path: str, on_cpu: bool, settings: tuple[tuple[str, Any], ...], rate: float, hidden: int, ranks: int
) -> Zero:
    here = {"attn_implementation": "auto", "paged_adamw": False}  # whatever this machine lacks
    options = OptimiserOptions(**dict(settings) | here)
    path = path or str(CONFIG_FOLDER / ("zero0.json" if on_cpu else "zero2.json"))
    config = load_zero_config(path, options, rate)
    fill_bucket_sizes(config, hidden)
    zero = config["zero_optimization"]
    is_16_bit = any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    if json.loads(Path(path).read_text()).get("bf16", {}).get("enabled") == "auto":
        is_16_bit = zero["stage"] > 0 and not on_cpu  # "auto" was resolved for this machine's device
    return Zero(
        stage=zero["stage"],
        ranks=ranks,
        size=FP32 // 2 if is_16_bit else FP32,
        offloads_optimiser=offloads(config, "offload_optimizer"),
        offloads_weights=zero["stage"] == 3 and offloads(config, "offload_param"),
        bucket=int(zero.get("reduce_bucket_size", ALLREDUCE_BUCKET)),
        buffers=2 if zero.get("overlap_comm", zero["stage"] == 3) else 1,
        live=int(zero.get("stage3_max_live_parameters", Zero.live)),
        sub_group=int(zero.get("sub_group_size", Zero.sub_group)),
        all_reduces=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
        hpz=int(zero.get("zero_hpz_partition_size", Zero.hpz)),
        sums_in_fp32=is_16_bit and _sums_in_fp32(config, options),
        on_cpu=on_cpu,
    )


def _sums_in_fp32(config: dict[str, Any], options: OptimiserOptions) -> bool:
    """By the JSON, or else by the number of micro-batches."""
    chosen = config.get("data_types", {}).get("grad_accum_dtype")
    return chosen == "fp32" or (chosen is None and needs_fp32_sums(config, options))

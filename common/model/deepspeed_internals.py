"""Names of DeepSpeed that its documentation does not promise, one function each. Read from version 0.19.8."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 partitions this parameter."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter, also where this rank holds a part of it."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def full_size(parameter: Tensor) -> int:
    """Number of elements of a parameter, also where this rank holds a part of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def local_values(parameter: Tensor) -> Tensor:
    """The elements that this rank holds, without the padding at the end of the last partition."""
    if not is_partitioned(parameter):
        return parameter.detach()
    start = parameter.ds_tensor.ds_numel * dist.get_rank(parameter.ds_process_group)
    return parameter.ds_tensor.flatten()[: max(0, parameter.ds_numel - start)]


def skip_recovery_script(engine: Any) -> None:
    """Save checkpoints without `zero_to_fp32.py`: on a full disk, writing it raises on rank 0 alone."""
    engine._copy_recovery_script = lambda _: None


@contextlib.contextmanager
def universal_loading(engine: Any) -> Iterator[None]:
    """Inside, `load_checkpoint` reads the universal form, which the JSON alone can ask for."""
    engine._config.load_universal_checkpoint = True
    yield
    engine._config.load_universal_checkpoint = False


@contextlib.contextmanager
def without_stage3_hooks(engine: Any) -> Iterator[None]:
    """Inside, gathered weights stay gathered: ZeRO-3 hooks would partition a module after its forward."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    for parameter in engine.module.parameters():
        parameter.ds_active_sub_modules.clear()
    for hook in offload.forward_hooks + offload.backward_hooks:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload._register_deepspeed_module(offload.module)


def share_node_groups() -> None:
    """Let every model use the groups of ranks of `zero_hpz_partition_size`: DeepSpeed creates them for each
    model, and asserts that there are none yet.
    """
    from deepspeed.utils import groups

    if groups._get_zero_param_intra_parallel_group() is not None:
        groups._create_zero_param_parallel_group = lambda _: None


def update_master_weights(optimizer: Any) -> None:
    """Copy changed weights into the fp32 copy that ZeRO optimisers keep; plain optimisers have none."""
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()

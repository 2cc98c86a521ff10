"""DeepSpeed engines: create them, run an optimiser step, gather the weights."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.model.deepspeed_internals import full_shape, is_partitioned, without_stage3_hooks
from common.model.engine_protocol import Engine
from common.model.extensions import single_compilation
from common.model.pinned import pin_weights
from common.model.precision import check_same_precision, choose_sums
from common.model.zero import fill_bucket_sizes, offloads
from common.runtime.distributed import device, is_lost_contact, on_cpu
from common.runtime.options import OptimiserOptions, UserError, reason, world_size


def make_engine(
    model: nn.Module, zero: dict[str, Any], options: OptimiserOptions, learning_rate: float, total_steps: int
) -> Engine:
    """Create a DeepSpeed engine with AdamW and a schedule over `total_steps` optimiser steps."""
    from transformers import get_scheduler

    check_same_precision(zero)
    fill_bucket_sizes(zero, model.config.get_text_config().hidden_size)
    choose_sums(zero, options)
    model.train()  # from_pretrained returns eval mode, which turns gradient checkpointing off
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    schedule = partial(
        get_scheduler,
        options.lr_scheduler_type,
        num_warmup_steps=int(options.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )
    engine = _initialize(
        model=model,
        config=zero,
        optimizer=_adamw(model, zero, options, learning_rate),
        lr_scheduler=lambda optimizer: schedule(optimizer=optimizer),
    )
    if engine.zero_optimization_stage() == 0:
        engine.clip_fp32_gradients = lambda: None  # `_clip_plain` replaces it
    if world_size() == 1 and engine.zero_optimization_stage() == 0:
        # With one rank the all-reduce only copies all gradients to a buffer and back.
        engine.enable_backward_allreduce = False
    return engine


def make_frozen(model: nn.Module, zero: dict[str, Any] | None, offload: bool = False) -> nn.Module:
    """Freeze a model: partitioned in an engine at stage 3, else a plain module on the device.

    offload: keep the plain module in pinned host memory instead.
    """
    model.requires_grad_(False).eval()
    if zero is not None:
        return _initialize(model=model, config=zero)
    if not offload:
        return model.to(device())
    return pin_weights(model)


def _initialize(**arguments: Any) -> Engine:
    """Create an engine. Raises UserError for what DeepSpeed refuses only now, such as fp16 on a CPU."""
    import deepspeed

    try:
        return deepspeed.initialize(**arguments)[0]
    except Exception as error:
        if is_lost_contact(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"--zero_config: DeepSpeed does not start with it: {reason(error)}") from error


def backward_and_step(engine: Engine, loss: Tensor, ranks: int, is_last: bool) -> float | None:
    """Accumulate the gradients of one micro-batch; after the last one, update the weights.

    loss: this rank's share. Summed over ranks and micro-batches, the shares are the loss of the global batch.
    DeepSpeed averages gradients over ranks, so the share is multiplied by their number. Returns the gradient
    norm after an update. A non-finite loss or norm skips the update on all ranks and returns inf.
    """
    engine.set_gradient_accumulation_boundary(is_last)
    # An infinite loss can have finite gradients. This makes them NaN, which all ranks detect.
    poison = loss.detach() * 0 + 1
    engine.backward(loss * poison * ranks, scale_wrt_gas=False)
    is_plain = engine.zero_optimization_stage() == 0
    norm = _clip_plain(engine) if is_last and is_plain else math.inf
    engine.step()
    if not is_last:
        return None
    if not engine.was_step_applied():
        return math.inf
    return norm if is_plain else float(engine.get_global_grad_norm())


def full_state_dict(engine: Engine, trainable_only: bool = False) -> dict[str, Tensor] | None:
    """Copy all weights of the module to the CPU, on rank 0; None on the other ranks.

    Every rank must call it. Partitioned weights are gathered one at a time.
    """
    import deepspeed
    import torch.distributed as dist

    if engine.zero_optimization_stage() == 3:
        engine.empty_partition_cache()  # the last forward may have prefetched weights for another
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}  # tied weights stay one tensor, so that they are saved once
    trainable = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        if trainable_only and name not in trainable:
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=is_partitioned(tensor)):
            if is_first:
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
                state[name] = copies[id(tensor)]
    return state if is_first else None


def is_partial(engine: Engine) -> bool:
    """Whether some weights are frozen, as with adapters. Checkpoints leave frozen weights out."""
    return any(not p.requires_grad for p in engine.module.parameters())


def trained_state_dict(engine: Engine, **_: Any) -> dict[str, Any]:
    """State dict without frozen weights.

    DeepSpeed's own version keeps tied frozen weights under their second name, such as the output head.
    """
    frozen = {n for n, p in engine.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in engine.module.state_dict().items() if name not in frozen}


@contextlib.contextmanager
def gathered_weights(engine: Engine, gather_weights: bool = True) -> Iterator[nn.Module]:
    """Context manager: the module with all its weights gathered, for generation.

    At stage 3 the weights are gathered once and ZeRO's hooks are removed. Ranks may then run different
    numbers of forward passes, at full speed. Every GPU needs memory for the full 16-bit model. Without
    `gather_weights` the hooks stay on.
    """
    import deepspeed

    if not gather_weights or engine.zero_optimization_stage() != 3:
        yield engine.module
        return
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())), without_stage3_hooks(engine):
        yield engine.module


def check_states_away(zero: dict[str, Any], model: str) -> None:
    """Raise UserError where DeepSpeed does not move the optimiser's states. model: the trained one.

    At stage 3 it moves only those of its own Adam.
    """
    stage = zero["zero_optimization"]["stage"]
    if stage not in (1, 2):
        raise UserError(f"--offload_states: the {model} is at ZeRO stage {stage}; allowed: stage 1 or 2")
    if offloads(zero, "offload_optimizer"):
        raise UserError(
            f"--offload_states: the {model}'s DeepSpeed JSON has offload_optimizer, which keeps the states in"
            " host memory all the time; remove one of them"
        )


@contextlib.contextmanager
def states_away(engines: Sequence[Engine]) -> Iterator[None]:
    """Context manager: fp32 weights and moments of AdamW in pinned host memory (see `check_states_away`)."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as States

    for engine in engines:
        engine.offload_states(include=[States.hp_params, States.optim_states])
    try:
        yield
    finally:
        for engine in engines:
            engine.reload_states()


def _adamw(model: nn.Module, zero: dict[str, Any], options: OptimiserOptions, learning_rate: float) -> Any:
    """AdamW with weight decay on matrices only; DeepSpeed's CPU AdamW for GPU runs with optimiser offload;
    with --paged_adamw that of bitsandbytes.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    dimensions = {id(p): len(full_shape(p)) for p in trained}
    groups = [
        {"params": [p for p in trained if dimensions[id(p)] >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if dimensions[id(p)] < 2], "weight_decay": 0.0},
    ]
    settings = {
        "lr": learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    groups = [group for group in groups if group["params"]]
    if offloads(zero, "offload_optimizer") and not on_cpu():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with single_compilation():
            return DeepSpeedCPUAdam(groups, **settings)
    if options.paged_adamw:
        from bitsandbytes.optim import PagedAdamW32bit

        return PagedAdamW32bit(groups, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def _clip_plain(engine: Any) -> float:
    """Clip the gradients of a plain fp32 optimiser; returns their norm before clipping.

    At stage 0 DeepSpeed neither returns the norm nor checks it. A non-finite norm deletes the gradients and
    sets `overflow`, so that DeepSpeed counts the update as skipped.
    """
    trained = [p for p in engine.module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    engine.optimizer.overflow = not norm.isfinite()
    if engine.optimizer.overflow:
        engine.optimizer.zero_grad(set_to_none=True)
    elif engine.gradient_clipping() > 0:
        nn.utils.clip_grads_with_norm_(trained, engine.gradient_clipping(), norm)
    return float(norm)

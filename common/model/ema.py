"""EMA weights: an exponential moving average of the trained weights, in fp32, in host memory of rank 0."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.model.engine_protocol import Engine
from common.model.lora import is_adapted
from common.runtime.distributed import rank


def update_ema_weights(average: dict[str, Tensor], engine: Engine, decay: float) -> None:
    """average <- decay x average + (1 - decay) x trained weights; the first call copies the weights.

    The weights are the optimiser's fp32 ones: in 16 bits the small updates of a step would be rounded away.
    Every rank must call it; only rank 0 holds the average. Tied weights are averaged once, under their first
    name. Source: Polyak & Juditsky 1992; Ouyang et al. 2022, appendix C.4.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    only_trained, done = is_adapted(engine.module), set()
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        is_left_out = only_trained and not tensor.requires_grad
        if id(tensor) in done or is_left_out or not tensor.is_floating_point():
            continue
        done.add(id(tensor))
        weight = safe_get_full_fp32_param(tensor)
        if rank() == 0:
            # Plain fp32 optimisers keep no other copy of a weight.
            weight = (tensor if weight is None else weight).detach().to("cpu", torch.float32, copy=True)
            average.setdefault(name, weight).lerp_(weight, 1.0 - decay)


def with_ema_weights(weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace weights by their averages, in the dtype of the weights. Tied weights stay one tensor."""
    replaced: dict[int, Tensor] = {}
    for name, weight in weights.items():
        if id(weight) not in replaced:
            replaced[id(weight)] = average[name].to(weight.dtype) if name in average else weight
    return {name: replaced[id(weight)] for name, weight in weights.items()}

"""EMA weights: an exponential moving average of the trained weights, in fp32, in host memory of rank 0."""

from collections.abc import Mapping

from torch import Tensor

from common.model.engine import full_state_dict
from common.model.engine_protocol import Engine
from common.model.lora import is_adapted


def update_ema_weights(average: dict[str, Tensor], engine: Engine, decay: float) -> None:
    """average <- decay x average + (1 - decay) x trained weights; the first call copies the weights.

    Every rank must call it; only rank 0 holds the average. Tied weights are averaged once, under their first
    name. Source: Polyak & Juditsky 1992; Ouyang et al. 2022, appendix C.4.
    """
    weights = full_state_dict(engine, trainable_only=is_adapted(engine.module)) or {}
    names = {id(weight): name for name, weight in reversed(weights.items())}
    for name, weight in weights.items():
        if names[id(weight)] == name and weight.is_floating_point():
            average.setdefault(name, weight.float()).lerp_(weight.float(), 1.0 - decay)


def with_ema_weights(weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace weights by their averages, in the dtype of the weights. Tied weights stay one tensor."""
    replaced: dict[int, Tensor] = {}
    for name, weight in weights.items():
        if id(weight) not in replaced:
            replaced[id(weight)] = average[name].to(weight.dtype) if name in average else weight
    return {name: replaced[id(weight)] for name, weight in weights.items()}

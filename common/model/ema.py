"""An exponential moving average of weights, in fp32, on the host of rank 0."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.model.engine import full_state_dict
from common.model.lora import is_adapted


def update_ema_weights(average: dict[str, Tensor], engine: Any, decay: float) -> None:
    """average <- decay x average + (1 - decay) x the trained weights; the first time, the weights. Every rank
    must call it; the average is rank 0's.

    Tied weights are averaged once, under the first of their names. Source: Polyak & Juditsky 1992; Ouyang et
    al. 2022, appendix C.4.
    """
    weights = full_state_dict(engine, trainable_only=is_adapted(engine.module)) or {}
    names = {id(weight): name for name, weight in reversed(weights.items())}
    for name, weight in weights.items():
        if names[id(weight)] == name and weight.is_floating_point():
            average.setdefault(name, weight.float()).lerp_(weight.float(), 1.0 - decay)


def with_ema_weights(weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with their averages in their place, in their own dtype; tied ones stay one tensor."""
    replaced: dict[int, Tensor] = {}
    for name, weight in weights.items():
        if id(weight) not in replaced:
            replaced[id(weight)] = average[name].to(weight.dtype) if name in average else weight
    return {name: replaced[id(weight)] for name, weight in weights.items()}

"""Host memory of a machine, and disk space. Pure arithmetic."""

from collections.abc import Sequence
from typing import NamedTuple

from launch.plan.memory import FP32, MOMENTS, Model


class Storage(NamedTuple):
    """What a step needs beside its ranks' memory, in bytes."""

    exporting: float  # host memory of the first rank: the average, and the weights while it writes them
    checkpoint: float
    final: float  # folders of models at the end


def storage(trained: Sequence[Model], has_ema: bool = False) -> Storage:
    """trained: the models of a step, that of the EMA weights first."""
    first, *others = trained
    average = FP32 * first.shape.trained * has_ema
    copy = size_of(first) * has_ema  # the average in 16 bits
    return Storage(
        exporting=average + max(size_of(first) + copy, *map(size_of, others), 0.0),
        checkpoint=sum(map(checkpoint, trained)) + average,
        final=sum(map(size_of, trained)) + copy,
    )


def size_of(model: Model) -> float:
    """All weights in the precision of training."""
    return model.zero.size * model.shape.parameters


def checkpoint(model: Model) -> float:
    """Trained weights, unless stage 3 makes them from their fp32 copies; these, and two moments."""
    shape, zero = model
    weights = zero.size if zero.stage in (1, 2) else 0
    return (weights + FP32 + MOMENTS) * shape.trained


def of_machine(per_rank: float, ranks: int, exporting: float) -> float:
    """Host memory of the machine with the first rank."""
    return ranks * per_rank + exporting


def on_disk(needs: Storage, limit: int) -> float:
    """Checkpoints up to --save_total_limit, the one being written, and the models at the end."""
    return (limit + 1) * needs.checkpoint + needs.final

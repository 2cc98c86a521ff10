"""The type of a trained engine: the part of `deepspeed.DeepSpeedEngine` that the stages use."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Engine(Protocol):
    """A model with its optimiser and learning-rate schedule, from `make_engine`.

    Like a module it is called for a forward pass, and has `train` and `eval`. `backward_and_step` calls the
    methods of an update in their order. Code that reads DeepSpeed's settings or writes its files takes `Any`.
    """

    module: nn.Module  # the model, wrapped by peft with adapters
    training: bool
    optimizer: Any
    lr_scheduler: Any

    def __call__(self, **inputs: Any) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def get_lr(self) -> list[float]:
        """Learning rates of the next update, one per parameter group."""

    def zero_optimization_stage(self) -> int: ...

    def empty_partition_cache(self) -> None:
        """At stage 3, release weights that were gathered ahead."""

    def offload_states(self, include: Sequence[Any]) -> None:
        """Move states of the optimiser to host memory."""

    def reload_states(self) -> None: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Choose whether the next `step` updates the weights."""

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> Any:
        """Add the gradients of a micro-batch, averaged over ranks."""

    def step(self) -> None: ...

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the weights: not with non-finite gradients."""

    def get_global_grad_norm(self) -> Any:
        """Gradient norm of the last update, over all ranks and before clipping; not at stage 0."""

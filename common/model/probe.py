"""Compare two ways in which a model can encode the same tokens."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.runtime.distributed import is_lost_contact


@torch.no_grad()
def states_agree(model: nn.Module, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> bool:
    """Whether both ways give the same hidden states (N, hidden size). False where the model rejects a way."""
    was_training = model.training
    model.eval()
    try:
        expected = one()
        # The order of summation differs, so only half of the digits must agree.
        tolerance = torch.finfo(expected.dtype).eps ** 0.5 * (expected - expected.mean(0)).norm()
        return bool((other() - expected).norm() <= tolerance)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if is_lost_contact(error) or isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            raise
        return False
    finally:
        model.train(was_training)


def last_states(model: nn.Module, base: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Last hidden states (B, T, hidden size), the input of the output head or the scalar head.

    base: the transformers model inside `model`.
    """
    states, is_scalar = [], hasattr(base, "score")

    def take(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor] | None:
        states.append(arguments[0])
        return None if is_scalar else (arguments[0][:, -1:],)  # logits are not needed

    hook = (base.score if is_scalar else base.get_output_embeddings()).register_forward_pre_hook(take)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return states[0]

"""The output head as a linear layer: logits in fp32 from weights in 16 bits, and its gradients."""

from typing import Any

import torch
from torch import Tensor, nn

WIDENED = 2**24  # weights that a CPU, which has no such product, holds in fp32 at once


class Wide(torch.autograd.Function):
    """`wide_logits` with gradients, which are products in 16 bits."""

    @staticmethod
    def forward(ctx: Any, head: nn.Linear, states: Tensor, *_: Tensor) -> Tensor:
        ctx.head = head
        ctx.save_for_backward(states)
        return wide_logits(head, states)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = LinearGradients(ctx.head)
        gradients.add(*ctx.saved_tensors, upstream)
        return None, *gradients.total()


@torch.no_grad()
def wide_logits(head: nn.Linear, states: Tensor) -> Tensor:
    """Output of the head in fp32, also from factors in 16 bits: (N, hidden size) -> (N, V).

    Rounded to bf16, logits between 16 and 32 are up to 0.06 off, and log-probabilities with them.
    """
    weight = head.weight
    if weight.dtype == torch.float32:
        return nn.functional.linear(states, weight, head.bias)
    if states.is_cuda:
        logits = torch.mm(states, weight.T, out_dtype=torch.float32)
    else:
        logits, wide = states.new_empty(len(states), len(weight), dtype=torch.float32), states.float()
        size = max(1, WIDENED // weight.shape[1])
        for part, out in zip(weight.split(size), logits.split(size, dim=1), strict=True):
            out.copy_(wide @ part.float().T)
    return logits if head.bias is None else logits.add_(head.bias)


class LinearGradients:
    """Gradients of the states and the trained weights of a linear head, added up over chunks."""

    def __init__(self, head: nn.Linear) -> None:
        self._head, self._states = head, []
        self._weights = {name: torch.zeros_like(weight) for name, weight in trained_weights(head).items()}

    def add(self, states: Tensor, by_logits: Tensor) -> None:
        """states (n, hidden size), derivatives of the loss by their logits (n, V)."""
        by_logits = by_logits.to(states.dtype)
        self._states.append(by_logits @ self._head.weight)
        if "weight" in self._weights:
            self._weights["weight"].addmm_(by_logits.T, states)
        if "bias" in self._weights:
            self._weights["bias"].add_(by_logits.sum(0))

    def total(self) -> tuple[Tensor, ...]:
        """Those of all states, then those of the weights in the order of `trained_weights`."""
        return torch.cat(self._states), *self._weights.values()


def trained_weights(head: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in head.named_parameters() if weight.requires_grad}

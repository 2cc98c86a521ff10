"""Use of the experts of a mixture by a global batch: its load-balancing loss, and metrics."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common.model.engine_protocol import Engine
from common.model.forward import base_model
from common.model.load_balancing import (
    Routing,
    balance_coef,
    balance_loss,
    has_balance_loss,
    router_figures,
)
from common.runtime.distributed import sum_tensor_over_ranks
from common.training.means import Mean


class ExpertUse:
    """Of one update. Every rank creates one and makes the same calls. For a dense model it does nothing."""

    def __init__(
        self, engine: Engine | None, encode: Callable[[Any], Any], batches: Sequence[Any],
        is_real: Sequence[bool] = (),
    ) -> None:  # fmt: skip
        """encode: runs the forward pass of one of this rank's micro-batches. is_real: false for dummies;
        default: none is. engine: None if it takes no update.

        The loss needs the use of experts by the global batch before the first backward pass. With several
        micro-batches, a forward pass of all of them counts it first.
        """
        self._base = base_model(engine) if engine else None
        self._used: Routing | None = None  # by this rank
        self._has_loss = engine is not None and has_balance_loss(self._base)
        self._global: Routing | None = None
        if self._has_loss and len(batches) > 1:
            engine.eval()
            with torch.no_grad():
                for batch, is_counted in zip(batches, is_real or [True] * len(batches), strict=True):
                    encode(batch)
                    self._add(self._base.routing, is_counted)
            engine.train()
            self._global, self._used = _over_ranks(self._used), None

    def loss(self, is_real: bool = True) -> Tensor | float:
        """This micro-batch's share of the loss of the global batch, after its forward pass, with gradient."""
        routing = self._base.__dict__.pop("routing", None)
        if routing is None:
            return 0.0
        routing = self._add(routing, is_real)
        if not self._has_loss:
            return 0.0
        total = self._global or _over_ranks(routing)
        return balance_coef(self._base) * balance_loss(routing.probabilities, total.chosen, total.tokens)

    def metrics(self) -> dict[str, Mean]:
        """Metrics of the global batch: router/..., and train/aux_loss if the loss is on."""
        if self._used is None:
            return {}
        total = _over_ranks(self._used)
        figures = router_figures(total)
        if self._has_loss:
            loss = balance_loss(total.probabilities, total.chosen, total.tokens)
            figures["train/aux_loss"] = balance_coef(self._base) * float(loss)
        return {name: Mean(value) for name, value in figures.items()}

    def _add(self, routing: Routing, is_real: bool) -> Routing:
        routing = routing.scaled(float(is_real))
        parts = [part.detach() for part in routing]
        self._used = Routing(*map(torch.add, self._used, parts)) if self._used else Routing(*parts)
        return routing


def _over_ranks(routing: Routing) -> Routing:
    """Sum over all ranks, with one all-reduce; without gradient."""
    flat = torch.cat([part.detach().flatten() for part in routing])
    parts = sum_tensor_over_ranks(flat).split([part.numel() for part in routing])
    return Routing(*(new.view_as(part) for new, part in zip(parts, routing, strict=True)))

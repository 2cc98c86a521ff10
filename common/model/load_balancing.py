"""The load-balancing loss of mixtures of experts, which keeps the router from using a few of them only."""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def has_balance_loss(model: PreTrainedModel) -> bool:
    """Whether the configuration asks for the loss, by `output_router_logits` as in transformers."""
    needed = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
    if not all(hasattr(model, name) for name in needed):
        return False
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def balance_loss(model: PreTrainedModel, outputs: Any, positions: Tensor) -> Tensor:
    """The model's own loss times `router_aux_loss_coef`, times the number of tokens that were read: ().

    outputs: of a forward pass with router logits. positions (B, T) bool: what was predicted; the tokens after
    the last of a row are padding, which does not count. Divided by the tokens of a global batch, the sum over
    its micro-batches is their mean weighted by tokens.

    Expert use is counted per forward pass. So, unlike every other loss here, the value depends a little on
    the split into micro-batches. Source: Fedus et al. 2021 (Switch Transformer), eq. 4 to 6, on all layers
    together.
    """
    states = positions.long().flip(1).cumsum(1).flip(1) > 0  # (B, T) up to the last one that predicts
    is_read = states | states.roll(1, dims=1)  # and the token that it predicts
    loss = inspect.getmodule(type(model)).load_balancing_loss_func(
        outputs.router_logits, model.num_experts, model.num_experts_per_tok, is_read.long()
    )
    return model.router_aux_loss_coef * loss * is_read.sum()

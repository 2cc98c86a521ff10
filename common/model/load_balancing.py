"""Load-balancing loss of mixtures of experts: it keeps the router from using only a few experts."""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def has_balance_loss(model: PreTrainedModel) -> bool:
    """Whether `output_router_logits` in the configuration turns the loss on, as in transformers."""
    needed = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
    if not all(hasattr(model, name) for name in needed):
        return False
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def balance_loss(model: PreTrainedModel, outputs: Any, positions: Tensor) -> Tensor:
    """The model's own loss times `router_aux_loss_coef` times the number of real tokens: ().

    outputs: of a forward pass with router logits. positions (B, T) bool: True where the next token is
    predicted; everything after a row's last prediction is padding and does not count. The sum over the
    micro-batches, divided by the tokens of the global batch, is their mean weighted by tokens.

    Expert use is counted per forward pass. So, unlike all other losses here, the value depends slightly on
    the split into micro-batches. Source: Fedus et al. 2021 (Switch Transformer), eq. 4 to 6, over all layers.
    """
    is_read = up_to_last_label(positions)
    loss = inspect.getmodule(type(model)).load_balancing_loss_func(
        outputs.router_logits, model.num_experts, model.num_experts_per_tok, is_read.long()
    )
    return model.router_aux_loss_coef * loss * is_read.sum()


def up_to_last(is_chosen: Tensor) -> Tensor:
    """True up to the last chosen token of each row: (B, T) -> (B, T) bool."""
    return is_chosen.long().flip(1).cumsum(1).flip(1) > 0


def up_to_last_label(positions: Tensor) -> Tensor:
    """True up to the last predicted token of each row. positions (B, T): True before predicted tokens."""
    states = up_to_last(positions)
    return states | states.roll(1, dims=1)

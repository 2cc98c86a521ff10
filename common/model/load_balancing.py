"""Load-balancing loss of mixtures of experts: it keeps the router from using only a few experts."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.text.transformers_internals import router_class


class Routing(NamedTuple):
    """How some tokens use the E experts of each of the L layers that have any; sums over the tokens."""

    chosen: Tensor  # (L, E) times that the expert is among those chosen for a token
    probabilities: Tensor  # (L, E) of the router, fp32, with gradient
    entropy: Tensor  # (L,) of the router's distribution, in nats
    tokens: Tensor  # () their number

    def scaled(self, factor: float) -> "Routing":
        """All sums times a factor: 0 for a dummy batch."""
        return Routing(*(part * factor for part in self))


def has_balance_loss(model: PreTrainedModel) -> bool:
    """Whether `output_router_logits` in the configuration turns the loss on, as in transformers, with a
    coefficient above 0.
    """
    return bool(_outputs_logits(model) and router_class(model) and balance_coef(model))


def without_own_loss(model: PreTrainedModel) -> dict[str, bool]:
    """Input of a forward pass that turns the model's own load-balancing loss off: it reads another mask."""
    return {"output_router_logits": False} if _outputs_logits(model) else {}


def _outputs_logits(model: PreTrainedModel) -> bool:
    return getattr(model.config.get_text_config(), "output_router_logits", False)


def balance_coef(model: PreTrainedModel) -> float:
    """`router_aux_loss_coef` of the configuration, which the loss is multiplied by. Usually 0.001 to 0.02."""
    return _setting(model, "router_aux_loss_coef") or 0.0


def experts_per_token(model: PreTrainedModel) -> int:
    return _setting(model, "num_experts_per_tok") or 0


def _setting(model: PreTrainedModel, name: str) -> float | int | None:
    """Language models hold it under this name, also where the configuration has another."""
    return getattr(model, name, None) or getattr(model.config.get_text_config(), name, None)


@contextlib.contextmanager
def router_logits(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Context manager: a list to which a forward pass inside adds the router logits (B T, E) of each layer.

    It stays empty for a dense model, and for a mixture whose router is of another kind.
    """
    logits: list[Tensor] = []
    kind = router_class(model) if experts_per_token(model) else None

    def take(_: nn.Module, __: tuple[Tensor], output: Tensor | tuple[Tensor, ...]) -> None:
        logits.append(output[0] if isinstance(output, tuple) else output)

    # Only while the model runs forward: checkpointed layers run again in the backward pass.
    routers = [module for module in model.modules() if type(module) is kind] if kind else []
    hooks = [router.register_forward_hook(take) for router in routers]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def count_routing(logits: Sequence[Tensor], is_token: Tensor, top_k: int) -> Routing:
    """Sum over real tokens: router logits (B T, E) of each layer, is_token (B, T) bool; top_k experts per
    token.
    """
    weights = is_token.flatten().float()  # (B T,)
    chosen, probabilities, entropy = [], [], []
    for layer in logits:
        shares = torch.softmax(layer.float(), dim=-1)  # (B T, E)
        experts = shares.topk(top_k, dim=-1).indices  # (B T, top_k)
        counts = torch.zeros(layer.shape[-1], device=layer.device)
        chosen.append(counts.index_add_(0, experts.flatten(), weights.repeat_interleave(top_k)))
        probabilities.append(weights @ shares)
        entropy.append(torch.special.entr(shares.detach()).sum(-1) @ weights)
    return Routing(torch.stack(chosen), torch.stack(probabilities), torch.stack(entropy), weights.sum())


def balance_loss(probabilities: Tensor, chosen: Tensor, tokens: Tensor) -> Tensor:
    """E x the sum over experts of (choices per token) x (mean probability): ().

    chosen (L, E), tokens (): of the global batch. probabilities (L, E): of a part of it, whose share of the
    loss is returned. Means are over the tokens of all layers, as in transformers. Uniform use gives the
    number of experts per token. Source: Fedus et al. 2021 (Switch Transformer), eq. 4 to 6; over the global
    batch: Qiu et al. 2025 ("Demons in the Detail").
    """
    rows = tokens * len(chosen)
    return chosen.shape[-1] * (chosen.sum(0) / rows * probabilities.sum(0) / rows).sum()


def router_figures(routing: Routing) -> dict[str, float]:
    """Metrics of the use of experts, means over layers.

    max_load: share of the busiest expert times the number of experts, 1 if all are used alike. entropy: of
    the router's distribution per token, in nats, at most log E. unused: share of experts that no token uses.
    """
    shares = routing.chosen / routing.chosen.sum(1, keepdim=True)
    return {
        "router/max_load": float(shares.max(1).values.mean() * shares.shape[1]),
        "router/entropy": float(routing.entropy.mean() / routing.tokens),
        "router/unused": float((routing.chosen == 0).float().mean()),
    }


def up_to_last(is_chosen: Tensor) -> Tensor:
    """True up to the last chosen token of each row: (B, T) -> (B, T) bool."""
    return is_chosen.long().flip(1).cumsum(1).flip(1) > 0


def read_tokens(model: PreTrainedModel, positions: Tensor) -> Tensor:
    """True for the tokens of each row that count in the loss: positions (B, T) bool -> (B, T) bool.

    Those up to the last state that is read, and with an output head the label after it; the rest is padding.
    """
    states = up_to_last(positions)
    return states if hasattr(model, "score") else states | states.roll(1, dims=1)

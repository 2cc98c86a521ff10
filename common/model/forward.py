"""Logits and scores of a model at chosen positions only."""

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)

from common.model.load_balancing import balance_loss, has_balance_loss


def response_logits(
    model: nn.Module, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Logits of the model at the chosen positions only: input_ids (B, T), positions (B, T) bool -> (N, V).

    position_ids (B, T): given when rows hold several documents, at each of which they begin again at 0; most
    models then confine attention to the document by themselves.

    Rows are padded on the right. No attention mask is passed: under causal attention a real token never sees
    what follows it, and without a mask attention takes its fastest path. The output head sees the N chosen
    hidden states, so that no logits are made for prompts and padding.
    """
    return logits_and_balance(model, input_ids, positions, position_ids)[0]


def logits_and_balance(
    model: nn.Module, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`response_logits`, and what a mixture of experts adds to the loss in training: see `balance_loss`; else
    0.
    """
    base = base_model(model)
    head = base.get_output_embeddings()
    choose = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][positions],))
    packed = {} if position_ids is None else {"position_ids": position_ids}
    try:
        outputs = model(input_ids=input_ids, use_cache=False, **packed)
    finally:
        choose.remove()
    if base.training and has_balance_loss(base):
        return outputs.logits, balance_loss(base, outputs, positions)
    return outputs.logits, torch.zeros((), device=input_ids.device)


def token_scores(model: nn.Module, input_ids: Tensor, positions: Tensor, **layout: Tensor) -> Tensor:
    """Scalar output at the chosen positions: input_ids (B, T) padded right, positions (B, T) bool -> (N,)
    fp32.

    The model's own forward would choose a position by the pad id; the head's output is read on its way out
    instead. The `reward_mean` and `reward_std` of the configuration, which step 2 writes, are applied.

    layout: for rows that are not one plain sequence each, `position_ids` (B, T) and an `attention_mask`
    (B, 1, T, T) that is added to the attention logits.
    """
    return token_scores_and_states(model, input_ids, positions, **layout)[0]


def token_scores_and_states(
    model: nn.Module, input_ids: Tensor, positions: Tensor, **layout: Tensor
) -> tuple[Tensor, Tensor]:
    """`token_scores`, and the last hidden states (B, T, hidden size), which the scalar head reads."""
    calls: list[tuple[Tensor, Tensor]] = []
    read = base_model(model).score.register_forward_hook(
        lambda _, inputs, output: calls.append((inputs[0], output))
    )
    try:
        model(input_ids=input_ids, use_cache=False, **layout)
    finally:
        read.remove()
    (states, outputs), config = calls[0], base_model(model).config
    scores = outputs[positions].squeeze(-1)  # (B, T, 1) -> (N,)
    centred = (scores - getattr(config, "reward_mean", 0.0)) / getattr(config, "reward_std", 1.0)
    return centred, states


def last_positions(lengths: Tensor, width: int) -> Tensor:
    """True at the last token of each row: lengths (B,) -> (B, width) bool."""
    return torch.arange(width, device=lengths.device) == (lengths - 1).unsqueeze(1)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a DeepSpeed engine or a peft wrapper."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model

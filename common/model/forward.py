"""Forward passes that return logits or scores at selected positions only."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.model.load_balancing import balance_loss, has_balance_loss
from common.numeric.tensor_ops import label_logprobs


def response_logits(
    model: nn.Module, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Logits at the selected positions: input_ids (B, T), positions (B, T) bool -> (N, V).

    position_ids (B, T): for packed rows; they restart at 0 with each document, and most models then restrict
    attention to the document.

    Rows are padded on the right. No attention mask is passed: with causal attention a real token never
    attends to padding, and attention is fastest without a mask. The output head receives only the N selected
    hidden states, so that no logits are computed for prompts and padding.
    """
    return logits_and_balance(model, input_ids, positions, position_ids)[0]


def logits_and_balance(
    model: nn.Module, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`response_logits`, and the load-balancing loss of a mixture of experts in training, else 0."""
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


def token_logprobs(model: nn.Module, input_ids: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels: input_ids (B, T), is_label (B, T) bool -> (N,) fp32.

    The first token of a row cannot be a label, because no state predicts it. Also returns the load-balancing
    loss, as `logits_and_balance` does.
    """
    logits, balance = logits_and_balance(model, input_ids, is_label.roll(-1, dims=1))
    return label_logprobs(logits, input_ids[is_label]), balance


def token_scores(model: nn.Module, input_ids: Tensor, positions: Tensor, **layout: Tensor) -> Tensor:
    """Scores at the selected positions: input_ids (B, T) padded right, positions (B, T) bool -> (N,) fp32.

    The model's own forward pass would select a position by the pad id, so a hook reads the head's output.
    Scores are centred and scaled by `reward_mean` and `reward_std` of the configuration (written by step 2).

    layout: for rows with several sequences, `position_ids` (B, T) and an `attention_mask` (B, 1, T, T) that
    is added to the attention logits.
    """
    return token_scores_and_states(model, input_ids, positions, **layout)[0]


def token_scores_and_states(
    model: nn.Module, input_ids: Tensor, positions: Tensor, **layout: Tensor
) -> tuple[Tensor, Tensor]:
    """`token_scores`, and the last hidden states (B, T, hidden size), the input of the scalar head."""
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


def pad_token_id(model: nn.Module) -> int:
    """The pad id of the model's tokenizer, set when the model was loaded."""
    return base_model(model).config.pad_token_id


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a DeepSpeed engine or a peft wrapper."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model

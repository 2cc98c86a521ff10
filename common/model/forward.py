"""Forward passes that compute log-probabilities or scores at selected positions only."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.model.head import ChunkedHead, Entropy, Targets, logprobs_and_entropy
from common.model.load_balancing import count_routing, experts_per_token, read_tokens, router_logits
from common.model.unpadded import Inputs, Positions, make_inputs
from common.runtime.distributed import log


class LabelPass(NamedTuple):
    """Result of a forward pass that predicts N labels."""

    logprobs: Tensor  # (N,) fp32
    entropy: Tensor  # (N,) fp32, of the distribution at each position; 0 where it is not asked for


def label_pass(
    model: nn.Module, input_ids: Tensor, positions: Positions, targets: Targets,
    position_ids: Tensor | None = None, attention_mask: Tensor | None = None,
) -> LabelPass:  # fmt: skip
    """Log-probabilities of labels: input_ids (B, T), positions of the N states before them.

    position_ids (B, T): for packed rows; they restart at 0 with each document, and most models then restrict
    attention to the document. With an attention_mask (B, 1, T, T): of rows whose responses share a prompt.

    Rows are padded on the right; `make_inputs` removes padding where attention takes lengths. Else they need
    no attention mask: with causal attention a real token never attends to padding. The output head receives
    only the N selected hidden states, in chunks, so that no logits are computed for prompts and padding and
    few at once.
    """
    layout = position_ids, attention_mask
    base = base_model(model)
    if getattr(base, "has_own_logits", False):
        return LabelPass(*logprobs_and_entropy(_chosen_logits(model, input_ids, positions, *layout), targets))
    inputs = make_inputs(model, base, input_ids, positions, *layout)
    with ChunkedHead(base, inputs.positions, targets) as head:
        outputs = _run(model, base, inputs)
    if not hasattr(base, "has_own_logits"):  # once per model, as a GPU would have to wait for the answer
        base.has_own_logits = not head.is_exact(outputs.logits)
        if base.has_own_logits:
            log(
                f"model type {base.config.model_type!r} changes its logits in a way of its own: those of all"
                " tokens of a micro-batch are in memory at once"
            )
            return label_pass(model, input_ids, positions, targets, *layout)
    return LabelPass(*head.result)


def response_logits(
    model: nn.Module, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Logits at few positions: input_ids (B, T), positions (B, T) bool -> (N, V); see `label_pass`."""
    return _chosen_logits(model, input_ids, positions, position_ids)


def _chosen_logits(
    model: nn.Module, input_ids: Tensor, positions: Positions, position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    base = base_model(model)
    inputs = make_inputs(model, base, input_ids, positions, position_ids, attention_mask)
    head = base.get_output_embeddings()
    choose = head.register_forward_pre_hook(lambda _, states: (states[0][inputs.positions],))
    try:
        return _run(model, base, inputs).logits
    finally:
        choose.remove()


def token_logprobs(
    model: nn.Module, input_ids: Tensor, is_label: Tensor, entropy: Entropy = "none", is_summed: bool = False
) -> LabelPass:
    """Predict the labels: input_ids (B, T), is_label (B, T) bool; entropy, is_summed: see `Targets`.

    The first token of a row cannot be a label, because no state predicts it.
    """
    targets = Targets(input_ids[is_label], entropy=entropy, is_summed=is_summed)
    return label_pass(model, input_ids, is_label.roll(-1, dims=1), targets)


def token_scores(model: nn.Module, input_ids: Tensor, positions: Positions, **layout: Tensor) -> Tensor:
    """Scores at the selected positions: input_ids (B, T) padded right, N positions -> (N,) fp32.

    The model's own forward pass would select a position by the pad id, so a hook reads the head's output.
    Scores are centred and scaled by `reward_mean` and `reward_std` of the configuration (written by step 2).

    layout: for rows with several sequences, `position_ids` (B, T) and an `attention_mask` (B, 1, T, T) that
    is added to the attention logits.
    """
    return _score_pass(model, input_ids, positions, **layout)[0]


def token_scores_and_states(
    model: nn.Module, input_ids: Tensor, positions: Positions, **layout: Tensor
) -> tuple[Tensor, Tensor]:
    """`token_scores`, and the last hidden states (B, T, hidden size), the input of the scalar head.

    The states are those up to the last position of each row.
    """
    scores, states, inputs = _score_pass(model, input_ids, positions, **layout)
    return scores, inputs.padded(states)


def _score_pass(
    model: nn.Module, input_ids: Tensor, positions: Positions, **layout: Tensor
) -> tuple[Tensor, Tensor, Inputs]:
    """`token_scores`, and the last hidden states with the inputs they belong to."""
    base = base_model(model)
    inputs = make_inputs(model, base, input_ids, positions, **layout)
    calls: list[tuple[Tensor, Tensor]] = []
    read = base.score.register_forward_hook(lambda _, states, output: calls.append((states[0], output)))
    try:
        _run(model, base, inputs)
    finally:
        read.remove()
    (states, outputs), config = calls[0], base.config
    scores = outputs[inputs.positions].squeeze(-1)  # (B, T, 1) -> (N,)
    centred = (scores - getattr(config, "reward_mean", 0.0)) / getattr(config, "reward_std", 1.0)
    return centred, states, inputs


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


def _run(model: nn.Module, base: PreTrainedModel, inputs: Inputs) -> Any:
    """Forward pass. `routing` of the base counts the experts of a mixture; see `ExpertUse`."""
    with router_logits(base) as of_layers:
        outputs = model(**inputs.of_model, use_cache=False)
    if of_layers:
        is_read = torch.zeros_like(inputs.of_model["input_ids"], dtype=torch.bool)
        is_read[inputs.positions] = True
        base.routing = count_routing(of_layers, read_tokens(base, is_read), experts_per_token(base))
    return outputs

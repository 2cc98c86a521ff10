"""Decoding steps: from the tokens just drawn to the logits after them."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from common.generation.cache import is_in_place
from common.generation.prefill import select_rows
from common.text.transformers_internals import next_inputs, takes_prepared_mask


class GrowingSteps:
    """Steps with inputs as `generate` prepares them; for every family."""

    def __init__(
        self, model: PreTrainedModel, input_ids: Tensor, inputs: dict[str, Any], cache_name: str
    ) -> None:
        self.model, self.input_ids, self.inputs, self.cache_name = model, input_ids, inputs, cache_name

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (b, V) after tokens (b,), one more for each row."""
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=1)
        fed = self.model.prepare_inputs_for_generation(self.input_ids, next_sequence_length=1, **self.inputs)
        outputs = self.model(**fed, return_dict=True)
        self.inputs = next_inputs(self.model, outputs, self.inputs)
        return outputs.logits[:, -1]

    def select(self, order: list[int]) -> None:
        """Continue with these of the rows alone."""
        self.input_ids = self.input_ids[order]
        self.inputs[self.cache_name].reorder_cache(torch.tensor(order))
        self.inputs |= select_rows(self.inputs, order)


class DirectSteps:
    """Steps with a mask for all columns, made once, and positions counted in place."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any], columns: int) -> None:
        self.model, self.cache = model, inputs["past_key_values"]
        self.positions = inputs["position_ids"][:, -1:].clone()  # (B, 1) of the next token
        self.column = self.cache.get_seq_length()  # of the next token
        self.more = {name: inputs[name] for name in ("output_router_logits",) if name in inputs}
        hidden = torch.zeros_like(inputs["position_ids"][:, : self.column])  # (B, P)
        if inputs.get("attention_mask") is not None:  # None: no prompt is padded
            hidden = 1 - inputs["attention_mask"][:, : self.column]
        self.is_padded = hidden.any(1).tolist()
        self.mask = torch.zeros(  # added to attention logits
            len(hidden), 1, 1, columns, dtype=model.dtype, device=hidden.device
        )
        self.mask[:, 0, 0, : self.column].masked_fill_(hidden.bool(), torch.finfo(model.dtype).min)

    def logits(self, tokens: Tensor) -> Tensor:
        """As `GrowingSteps.logits`."""
        self.column += 1
        logits = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask[..., : self.column] if any(self.is_padded) else None,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **self.more,
        ).logits[:, -1]
        self.positions += 1
        return logits

    def select(self, order: list[int]) -> None:
        """As `GrowingSteps.select`."""
        self.cache.reorder_cache(torch.tensor(order))
        self.is_padded = [self.is_padded[row] for row in order]
        self.mask, self.positions = self.mask[order], self.positions[order]

    def step_back(self) -> None:
        """Undo the last step; the next one writes to the same column."""
        self.column -= 1
        self.positions -= 1
        for layer in self.cache.layers:
            layer.length -= 1


Steps = GrowingSteps | DirectSteps


def make_steps(
    model: PreTrainedModel, input_ids: Tensor, inputs: dict[str, Any], cache_name: str, columns: int
) -> Steps:
    """The fastest steps that the family allows; inputs: after the prompts input_ids (B, P)."""
    cache: Cache = inputs[cache_name]
    if is_in_place(cache) and takes_prepared_mask(model) and "position_ids" in inputs:
        return DirectSteps(model, inputs, columns)
    return GrowingSteps(model, input_ids, inputs, cache_name)

"""Batches without padding: where attention takes the lengths of sequences, a batch is run as one row."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from common.model import varlen_attention
from common.model.load_balancing import has_balance_loss, read_tokens, up_to_last, without_own_loss
from common.model.probe import last_states, states_agree
from common.runtime.distributed import device, log
from common.text.transformers_internals import attention_implementation

PROBE = 16  # tokens of a row of the check
FLASH = ("flash_attention_2", "flash_attention_3")

# N states of rows (B, T): a mask (B, T), or rows and columns (N,), which may name a state several times.
Positions = Tensor | tuple[Tensor, Tensor]


class Inputs(NamedTuple):
    """Inputs of a forward pass."""

    of_model: dict[str, Tensor | int]
    positions: Positions  # of the N states that are read
    columns: Tensor | None = None  # (B, T) of each token in the one row; None: the batch is padded

    def padded(self, states: Tensor) -> Tensor:
        """Put states (1, tokens, ...) back into rows (B, T, ...), up to the last that is read in each."""
        return states if self.columns is None else states[0, self.columns]


def make_inputs(
    model: nn.Module, base: PreTrainedModel, input_ids: Tensor, positions: Positions,
    position_ids: Tensor | None = None, attention_mask: Tensor | None = None,
) -> Inputs:  # fmt: skip
    """Lay out a batch (B, T), without padding if the model can. base: the transformers model in `model`.

    position_ids (B, T): they restart at 0 with each sequence of a packed row. With an attention_mask, for
    rows that share prompts, padding stays.
    """
    layout = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
    padded = {name: value for name, value in layout.items() if value is not None}
    if attention_mask is not None or not can_unpad(model, base):
        return Inputs(padded | without_own_loss(base), positions)
    return without_padding(base, input_ids, positions, position_ids)


def without_padding(
    base: PreTrainedModel, input_ids: Tensor, positions: Positions, position_ids: Tensor | None
) -> Inputs:
    """Join rows, each up to the last state that is read: attention is causal, so the rest has no effect."""
    is_read = torch.zeros_like(input_ids, dtype=torch.bool)
    is_read[positions] = True
    is_needed = read_tokens(base, is_read) if has_balance_loss(base) else up_to_last(is_read)
    is_needed[0, 0] = True  # kernels refuse a row without tokens
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    position_ids = position_ids[is_needed]  # (N,)
    starts = (position_ids == 0).nonzero()[:, 0]
    boundaries = pad(starts, (0, 1), value=len(position_ids)).int()
    longest = int(boundaries.diff().max())
    inputs = {
        "input_ids": input_ids[is_needed][None], "position_ids": position_ids[None],
        "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
    if attention_implementation(base.config.get_text_config()) not in FLASH:
        inputs["attention_mask"] = input_ids.new_zeros(1, 1, 1, 1)  # unused; else transformers makes (N, N)
    inputs |= without_own_loss(base)
    columns = is_needed.flatten().cumsum(0).view(input_ids.shape) - 1
    chosen = columns[positions]
    return Inputs(inputs, (torch.zeros_like(chosen), chosen), columns)


def can_unpad(model: nn.Module, base: PreTrainedModel) -> bool:
    """Whether the model encodes rows without padding as it encodes padded ones; if not, this is logged once.

    Not with kernels that take no lengths, with recurrent states, which would pass from one sequence to the
    next, and with kernels that get neither lengths nor position ids. At ZeRO-3 every rank must call this.
    """
    kernels = attention_implementation(base.config.get_text_config())
    if kernels not in FLASH and not (kernels == "sdpa" and varlen_attention.is_registered()):
        return False
    if not hasattr(base, "can_unpad"):
        base.can_unpad = _encodes_alike(model, base)
        if not base.can_unpad:
            log(f"model type {base.config.model_type!r} cannot do without padding: rows are padded")
    return base.can_unpad


def _encodes_alike(model: nn.Module, base: PreTrainedModel) -> bool:
    text = base.config.get_text_config()
    if getattr(text, "attention_chunk_size", None):  # refused for rows that are longer than a chunk
        return False
    ids = torch.randint(text.vocab_size, (2, PROBE), generator=torch.Generator().manual_seed(0)).to(device())
    is_token = torch.arange(PROBE, device=device()) < torch.tensor([[PROBE // 2], [PROBE]], device=device())
    inputs = without_padding(base, ids, is_token, None)
    return states_agree(
        model,
        lambda: last_states(model, base, input_ids=ids)[is_token],  # (N, hidden size)
        lambda: last_states(model, base, **inputs.of_model)[inputs.positions],
    )

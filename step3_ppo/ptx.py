"""PPO-ptx: train the actor on demonstrations as well, so that it does not forget them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data.batching import batch_order, deal, pad_rows
from common.data.examples import Examples
from common.data.loading import load_examples
from common.model.engine import backward_and_step
from common.model.forward import response_logits
from common.numeric.tensor_ops import label_logprobs
from common.runtime.distributed import device, rank
from common.runtime.options import world_size
from common.text.record_formats import Record
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import fit_demonstration
from step3_ppo.options import PPOOptions


class MaskedText(NamedTuple):
    """Token ids of a demonstration and its response mask."""

    ids: list[int]
    is_response: list[bool]

    @property
    def length(self) -> int:
        return len(self.ids)


def tokenize_text(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str
) -> tuple[MaskedText, bool]:
    """Tokenise a demonstration; the flag says that it was cut. Raises Dropped or ValueError."""
    row, is_cut = fit_demonstration(record, encoder, max_length, overlong)
    return MaskedText(*row), is_cut


def load_texts(options: PPOOptions, encoder: SegmentEncoder) -> Examples[MaskedText] | None:
    """All demonstrations of --ptx_data; None without the option."""
    if not options.ptx_data:
        return None
    length = options.max_prompt_length + options.max_response_length
    convert = partial(tokenize_text, encoder=encoder, max_length=length, overlong=options.overlong)
    use_all = replace(options, eval_data=[], eval_fraction=0.0, data_split="")
    return load_examples(options.ptx_data, use_all, MaskedText, convert)[0]


class PretrainingMix:
    """One batch of demonstrations per actor update, in endless shuffled order, starting at batch `start`."""

    def __init__(
        self, texts: Sequence[MaskedText], options: PPOOptions, pad_token_id: int, start: int
    ) -> None:
        lengths = [len(text.ids) for text in texts]
        self._texts, self._options, self._pad, self.taken = texts, options, pad_token_id, start
        self._order = batch_order(lengths, options.global_batch_size, options.seed, start, grouped=True)

    def add_gradients(self, actor: Any) -> Tensor:
        """Accumulate the gradients of the next batch; returns this rank's share of its loss.

        The loss is the mean over the response tokens of the batch. Source: Ouyang et al. 2022, eq. 2.
        """
        options, rows = self._options, [self._texts[i] for i in next(self._order)]
        self.taken += 1
        tokens = sum(sum(row.is_response[1:]) for row in rows)
        lengths = [len(row.ids) for row in rows]
        total = torch.zeros((), device=device())
        for chunk in deal(range(len(rows)), lengths, options.micro_batch_size, rank(), world_size()):
            losses = -demonstration_logprobs(actor, [rows[i] for i in chunk], self._pad)
            backward_and_step(actor, options.ptx_coef * losses.sum() / tokens, world_size(), is_last=False)
            total += losses.detach().sum() / tokens
        return total


def demonstration_logprobs(model: Any, rows: Sequence[MaskedText], pad_token_id: int) -> Tensor:
    """Log-probability (N,) of each response token of the demonstrations."""
    input_ids = pad_rows([row.ids for row in rows], pad_token_id).to(device())  # (B, T)
    is_response = pad_rows([row.is_response for row in rows], False).to(device())
    is_response[:, 0] = False  # no state predicts the first token
    before = is_response.roll(-1, dims=1)  # (B, T)
    logits = response_logits(model, input_ids, before)
    return label_logprobs(logits, input_ids[is_response])

"""The actor goes on learning from demonstrations beside PPO, so as not to forget them (PPO-ptx)."""

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


class Text(NamedTuple):
    """Token ids of a demonstration, and which of them belong to a response."""

    ids: list[int]
    is_response: list[bool]

    @property
    def length(self) -> int:
        return len(self.ids)


def text(record: Record, encoder: SegmentEncoder, max_length: int, overlong: str) -> tuple[Text, bool]:
    """Tokenise a demonstration; whether it was cut. Raises Dropped or ValueError."""
    row, is_cut = fit_demonstration(record, encoder, max_length, overlong)
    return Text(*row), is_cut


def load_texts(options: PPOOptions, encoder: SegmentEncoder) -> Examples[Text] | None:
    """The demonstrations of --ptx_data, all of them; None without any."""
    if not options.ptx_data:
        return None
    length = options.max_prompt_length + options.max_response_length
    convert = partial(text, encoder=encoder, max_length=length, overlong=options.overlong)
    whole = replace(options, eval_data=[], eval_fraction=0.0, data_split="")
    return load_examples(options.ptx_data, whole, Text, convert)[0]


class PretrainingMix:
    """A batch of demonstrations for each update of the actor: those that follow each other in the data's
    endless shuffled order, from batch number `start` on.
    """

    def __init__(self, texts: Sequence[Text], options: PPOOptions, pad_token_id: int, start: int) -> None:
        lengths = [len(text.ids) for text in texts]
        self._texts, self._options, self._pad, self.taken = texts, options, pad_token_id, start
        self._order = batch_order(lengths, options.global_batch_size, options.seed, start, grouped=True)

    def add_gradients(self, actor: Any) -> Tensor:
        """Add the gradients of the next batch to those of the update to come; this rank's share of its loss.

        The loss is a mean over the response tokens of the batch. Source: Ouyang et al. 2022, eq. 2.
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


def demonstration_logprobs(model: Any, rows: Sequence[Text], pad_token_id: int) -> Tensor:
    """Log-probability (N,) of each response token of some demonstrations."""
    input_ids = pad_rows([row.ids for row in rows], pad_token_id).to(device())  # (B, T)
    is_response = pad_rows([row.is_response for row in rows], False).to(device())
    is_response[:, 0] = False  # nothing comes before it
    before = is_response.roll(-1, dims=1)  # (B, T)
    logits = response_logits(model, input_ids, before)
    return label_logprobs(logits, input_ids[is_response])

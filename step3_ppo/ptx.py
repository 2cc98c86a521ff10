"""PPO-ptx: train the actor on demonstrations as well, so that it does not forget them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from common.data.batching import batch_order, deal, micro_batch, pad_rows
from common.data.examples import Examples
from common.data.loading import load_examples
from common.model.engine import backward_and_step
from common.model.engine_protocol import Engine
from common.model.forward import pad_token_id, token_logprobs
from common.runtime.distributed import device, rank
from common.runtime.options import world_size
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import MaskedText, fit_demonstration
from step3_ppo.options import PPOOptions
from step3_ppo.state import PPOState


def load_texts(options: PPOOptions, encoder: SegmentEncoder) -> Examples[MaskedText] | None:
    """All demonstrations of --ptx_data; None without the option."""
    if not options.ptx_data:
        return None
    length = options.max_prompt_length + options.max_response_length
    convert = partial(fit_demonstration, encoder=encoder, max_length=length, overlong=options.overlong)
    use_all = replace(options, eval_data=[], eval_fraction=0.0, data_split="")
    return load_examples(options.ptx_data, use_all, MaskedText, convert)[0]


class PretrainingMix:
    """One batch of demonstrations per actor update, in endless shuffled order; the state counts them."""

    def __init__(self, texts: Sequence[MaskedText], options: PPOOptions, state: PPOState) -> None:
        self._texts, self._options, self._state = texts, options, state
        lengths, size = [text.length for text in texts], options.global_batch_size
        self._order = batch_order(lengths, size, options.seed, state.ptx_batches, grouped=True)

    def add_gradients(self, actor: Engine) -> Tensor:
        """Accumulate the gradients of the next batch; returns this rank's share of its loss.

        The loss is the mean over the response tokens of the batch. Source: Ouyang et al. 2022, eq. 2.
        """
        options, rows = self._options, [self._texts[i] for i in next(self._order)]
        self._state.ptx_batches += 1
        tokens = sum(sum(row.is_response[1:]) for row in rows)
        lengths = [len(row.ids) for row in rows]
        total = torch.zeros((), device=device())
        for chunk in deal(range(len(rows)), lengths, micro_batch(options), rank(), world_size()):
            losses = -demonstration_logprobs(actor, [rows[i] for i in chunk])
            backward_and_step(actor, options.ptx_coef * losses.sum() / tokens, world_size(), is_last=False)
            total += losses.detach().sum() / tokens
        return total


def demonstration_logprobs(model: nn.Module, rows: Sequence[MaskedText]) -> Tensor:
    """Log-probability (N,) of each response token of the demonstrations."""
    input_ids = pad_rows([row.ids for row in rows], pad_token_id(model)).to(device())  # (B, T)
    is_response = pad_rows([row.is_response for row in rows], False).to(device())
    is_response[:, 0] = False  # no state predicts the first token
    return token_logprobs(model, input_ids, is_response, is_summed=True)[0]

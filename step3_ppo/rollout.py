"""Rollouts: sampled responses with their log-probabilities, values and scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.data.batching import pad_rows
from common.generation.decoding import Responses
from common.generation.generate import Sampler, generate, prompts_of_rank
from common.generation.options import GenerationOptions
from common.model.forward import LabelPass, base_model, label_pass
from common.model.head import Entropy, Targets
from common.numeric.top_k_top_p import Support
from common.runtime.distributed import device, gather_lists, gather_rows, sum_tensor_over_ranks
from common.text.prompts import Prompt
from common.text.tokenizer import SegmentEncoder


@dataclass(frozen=True)
class Rows:
    """A micro-batch of a rollout, padded to its longest row."""

    input_ids: Tensor  # (b, T) padded on the right
    positions: Tensor  # (b, T) bool: states before the N response tokens
    labels: Tensor  # (N,) the response tokens
    support: Support  # of top-k and top-p, at the N states


@dataclass(frozen=True)
class Rollout:
    """B responses in the order of their prompts, the same on every rank.

    Token t of a response is in column t of every (B, R) tensor; columns after its end are 0. `values` and
    log-probabilities belong to the state before that token.
    """

    input_ids: Tensor  # (B, P + R) prompt and response without a gap, padded on the right
    prompt_lengths: Tensor  # (B,)
    response_lengths: Tensor  # (B,) at least 1; EOS counts
    ended: Tensor  # (B,) bool: an end token is its last
    behaviour_logprobs: Tensor  # (B, R) with which the tokens were drawn
    logprobs: Tensor  # (B, R) under the actor
    ref_logprobs: Tensor  # (B, R) under the reference
    values: Tensor  # (B, R) of the critic; 0 without one
    last_values: Tensor  # (B,) of the critic after the last token of a truncated response; else 0
    scores: Tensor  # (B,) by all reward models and functions
    score_parts: Tensor  # (B, M + F) by each reward model, then by each function
    support_sizes: Tensor  # (B, R) number of tokens left by top-k and top-p; 0 without them
    support_ids: Sequence[Tensor]  # B lists of those tokens, (S,) each
    computed: Tensor  # (B,) positions computed to sample it, including padding and idle steps

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @property
    def response_mask(self) -> Tensor:
        """(B, R) bool: true on response tokens."""
        return (
            torch.arange(self.logprobs.shape[1], device=self.logprobs.device) < self.response_lengths[:, None]
        )

    def prompt(self, row: int) -> list[int]:
        return self.input_ids[row, : self.prompt_lengths[row]].tolist()

    def response(self, row: int) -> list[int]:
        start = int(self.prompt_lengths[row])
        return self.input_ids[row, start : start + int(self.response_lengths[row])].tolist()

    def reply(self, row: int) -> list[int]:
        """The response without its end token."""
        return self.response(row)[: -1 if self.ended[row] else None]

    def rows(self, batch: Sequence[int]) -> Rows:
        """Select rows, without the padding that none of them needs."""
        index = torch.tensor(batch, device=self.input_ids.device)
        prompts, responses = self.prompt_lengths[index], self.response_lengths[index]
        width = int((prompts + responses).max())
        input_ids = self.input_ids[index, :width]
        positions = response_positions(prompts, responses, width)
        sizes = self.support_sizes[index][self.response_mask[index]]
        support = Support(sizes, torch.cat([self.support_ids[row] for row in batch]))
        return Rows(input_ids, positions, input_ids[positions.roll(1, dims=1)], support)

    def scatter(self, batches: Sequence[list[int]], parts: Sequence[Tensor]) -> Tensor:
        """Per-token numbers (N,) of each of this rank's batches, in their columns: (B, R) of all ranks."""
        mask = self.response_mask
        result = torch.zeros(mask.shape, device=mask.device)
        for batch, part in zip(batches, parts, strict=True):
            index = torch.tensor(batch, device=mask.device)
            block = torch.zeros(mask[index].shape, device=mask.device)
            block[mask[index]] = part
            result[index] = block
        return sum_tensor_over_ranks(result)

    def first(self, count: int) -> "Rollout":
        """The first responses."""
        return Rollout(**{name: value[:count] for name, value in vars(self).items()})


def response_positions(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """Mask (B, width) of the states before each response token; the first is the prompt's last token."""
    column = torch.arange(width, device=prompt_lengths.device)
    first = (prompt_lengths - 1)[:, None]
    return (column >= first) & (column < first + response_lengths[:, None])


def policy_pass(
    model: torch.nn.Module, rows: Rows, temperature: float, entropy: Entropy = "none"
) -> LabelPass:
    """Forward pass of the actor or the reference, under the distribution that responses are sampled from."""
    targets = Targets(rows.labels, temperature, base_model(model).num_tokens, rows.support, entropy)
    return label_pass(model, rows.input_ids, rows.positions, targets)


@torch.no_grad()
def sample_rollout(
    policy: Sampler, encoder: SegmentEncoder, prompts: Sequence[Prompt], options: GenerationOptions,
    step: int, title: str = "",
) -> Rollout:  # fmt: skip
    """Sample a response to each prompt, each rank a part of them. Fills tokens and the actor's
    log-probabilities; the rest is 0.

    step: with the seed and the row number, it determines the random numbers. The number of prompts must be a
    multiple of the number of ranks. title: of progress lines; none when empty.
    """
    ids = [prompt.ids for prompt in prompts]
    rank_rows = prompts_of_rank(ids)
    responses = generate(policy, encoder, ids, rank_rows, options, step, title)
    return assemble(prompts, rank_rows, responses, encoder)


def assemble(
    prompts: Sequence[Prompt], rank_rows: Sequence[int], responses: Responses, encoder: SegmentEncoder
) -> Rollout:
    """Gather the responses of all ranks into one rollout, the same on every rank."""
    of_rows = responses.ids, responses.lengths, responses.ended.long(), responses.logprobs
    of_rows += responses.support_sizes, responses.computed
    gathered = (gather_rows(field, rank_rows, len(prompts)) for field in of_rows)
    ids, lengths, ended, logprobs, support_sizes, computed = gathered
    logprobs, support_sizes = (part[:, : int(lengths.max())] for part in (logprobs, support_sizes))
    rows = [p.ids + row[:n] for p, row, n in zip(prompts, ids.tolist(), lengths.tolist(), strict=True)]
    return Rollout(
        input_ids=pad_rows(rows, encoder.pad_token_id).to(device()),
        prompt_lengths=torch.tensor([len(prompt.ids) for prompt in prompts], device=device()),
        response_lengths=lengths,
        ended=ended.bool(),
        behaviour_logprobs=logprobs,
        logprobs=logprobs,
        ref_logprobs=torch.zeros_like(logprobs),
        values=torch.zeros_like(logprobs),
        last_values=torch.zeros_like(logprobs[:, 0]),
        scores=torch.zeros_like(logprobs[:, 0]),
        score_parts=torch.zeros_like(logprobs[:, :0]),
        support_sizes=support_sizes,
        support_ids=gather_lists(responses.support_ids, rank_rows, support_sizes.sum(1)),
        computed=computed,
    )


def minibatches(rows: int, size: int, epochs: int, seed: int, step: int) -> Iterator[list[int]]:
    """Row indices of each minibatch; each epoch has a new order, the same on every rank."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, 2, step, epoch)).permutation(rows).tolist()
        for start in range(0, rows, size):
            yield order[start : start + size]

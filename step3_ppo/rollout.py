"""Rollouts: sampled responses with their log-probabilities, values and scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from common.data.batching import Tokens, deal, pad_rows, rows_of
from common.generation.decoding import Responses
from common.generation.generate import Sampler, generate, prompts_of_rank
from common.generation.options import GenerationOptions
from common.model.forward import LabelPass, base_model, label_pass
from common.model.head import Entropy, Targets
from common.model.shared_prompt import SEPARATE, Sharing, layout_inputs
from common.numeric.top_k_top_p import Support
from common.runtime.distributed import device, gather_lists, gather_rows, rank, sum_tensor_over_ranks
from common.runtime.options import world_size
from common.text.prompts import Prompt
from common.text.tokenizer import SegmentEncoder

Index = tuple[Tensor, Tensor]  # rows and columns


@dataclass(frozen=True)
class Rows:
    """A micro-batch of b responses on r rows, padded to the longest. A row may have several to one prompt."""

    input_ids: Tensor  # (r, T) padded on the right
    positions: Index  # states before the N response tokens
    ends: Index  # states after the b responses
    labels: Tensor  # (N,) the response tokens
    support: Support  # of top-k and top-p, at the N states
    shared: tuple[Tensor, Tensor] | None  # position ids and segments (r, T); None: a response per row

    def layout(self, model: nn.Module) -> dict[str, Tensor]:
        """Inputs of the model besides the ids."""
        return layout_inputs(model, *self.shared) if self.shared else {}


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
    scores: Tensor  # (B,) by all reward models and functions, plus the step scores
    score_parts: Tensor  # (B, M + F + P) by each reward model, each function, the process model if any
    step_scores: Tensor  # (B, R) by the process model, weighted, on the last token of each step; else 0
    step_ends: Tensor  # (B, R) bool: the last token of a step; false without a process model
    support_sizes: Tensor  # (B, R) number of tokens left by top-k and top-p; 0 without them
    support_ids: Sequence[Tensor]  # B lists of those tokens, (S,) each
    computed: Tensor  # (B,) positions computed to sample it, including padding and idle steps
    sharing: Sharing = SEPARATE  # neighbouring responses on a row with their prompt in forward passes

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

    def units(self, batch: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """Divide a batch into the responses of each row of tokens, and count the tokens of these rows."""
        count = self.sharing.responses
        units = [[*batch[start : start + count]] for start in range(0, len(batch), count)]
        prompts, responses = self.prompt_lengths.tolist(), self.response_lengths.tolist()
        return units, [prompts[unit[0]] + sum(responses[row] for row in unit) for unit in units]

    def deal(self, batch: Sequence[int], size: int | Tokens) -> list[list[int]]:
        """This rank's micro-batches of a batch; see `deal`. The responses of a row stay together."""
        units, lengths = self.units(batch)
        size = rows_of(size, self.sharing.responses)
        parts = deal(range(len(units)), lengths, size, rank(), world_size())
        return [[row for unit in part for row in units[unit]] for part in parts]

    def rows(self, batch: Sequence[int]) -> Rows:
        """Lay out responses, without the padding that none of them needs."""
        count = self.sharing.responses
        index = torch.tensor(batch, device=self.input_ids.device)  # (b,)
        prompts, lengths = self.prompt_lengths[index], self.response_lengths[index].view(-1, count)
        moved = lengths.cumsum(1) - lengths  # (r, count) columns that a response is moved to the right
        starts = prompts.view(-1, count) + moved
        input_ids, position_ids, segments = self._tokens(index.view(-1, count), starts, starts + lengths)
        response, token = self.response_mask[index].nonzero(as_tuple=True)  # (N,) each
        # The state before the first token is the prompt's last one, which the responses of a row share.
        before = torch.where(token > 0, starts.flatten()[response] + token, prompts[response]) - 1
        sizes = self.support_sizes[index][response, token]
        return Rows(
            input_ids,
            positions=(response // count, before),
            ends=(torch.arange(len(index), device=index.device) // count, (starts + lengths).flatten() - 1),
            labels=self.input_ids[index[response], prompts[response] + token],
            support=Support(sizes, torch.cat([self.support_ids[row] for row in batch])),
            shared=(position_ids, segments) if count > 1 else None,
        )

    def _tokens(self, index: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, position ids and segments (r, T) of rows with these responses, from `starts` to `ends`.

        All are (r, count). Segments are 0 in the prompt, 1, 2, ... in responses and -1 in padding.
        """
        column = torch.arange(int(ends.max()), device=index.device)  # (T,)
        segments = (column >= starts[:, :, None]).sum(1)  # (r, T)
        moved = pad(starts - starts[:, :1], (1, 0)).gather(1, segments)  # (r, T)
        source = torch.cat([index[:, :1], index], dim=1).gather(1, segments)
        position_ids = column - moved
        input_ids = self.input_ids[source, position_ids.clamp(max=self.input_ids.shape[1] - 1)]
        return input_ids, position_ids, segments.masked_fill(column >= ends[:, -1:], -1)

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

    def pick(self, rows: Sequence[int]) -> "Rollout":
        """The responses of some rows."""
        index = torch.tensor(rows, device=self.input_ids.device)
        tensors = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors, support_ids=[self.support_ids[row] for row in rows])


def concatenate(first: Rollout, second: Rollout) -> Rollout:
    """The responses of both, in the layout of the first."""
    tensors = {}
    for name, value in vars(first).items():
        if isinstance(value, Tensor):
            parts = [value, getattr(second, name)]
            if value.dim() > 1:
                columns = max(part.shape[1] for part in parts)
                parts = [pad(part, (0, columns - part.shape[1])) for part in parts]
            tensors[name] = torch.cat(parts)
    return replace(first, **tensors, support_ids=[*first.support_ids, *second.support_ids])


def policy_pass(model: nn.Module, rows: Rows, temperature: float, entropy: Entropy = "none") -> LabelPass:
    """Forward pass of the actor or the reference, under the distribution that responses are sampled from."""
    targets = Targets(rows.labels, temperature, base_model(model).num_tokens, rows.support, entropy)
    return label_pass(model, rows.input_ids, rows.positions, targets, **rows.layout(model))


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
        step_scores=torch.zeros_like(logprobs),
        step_ends=torch.zeros_like(logprobs, dtype=torch.bool),
        support_sizes=support_sizes,
        support_ids=gather_lists(responses.support_ids, rank_rows, support_sizes.sum(1)),
        computed=computed,
    )


def minibatches(
    rows: int, size: int, epochs: int, seed: int, step: int, group: int = 1
) -> Iterator[list[int]]:
    """Row indices of each minibatch; each epoch has a new order, the same on every rank.

    group: responses per prompt. They stay together, if minibatches hold groups without a rest.
    """
    group = group if size % group == 0 else 1
    for epoch in range(epochs):
        order = np.random.default_rng((seed, 2, step, epoch)).permutation(rows // group).tolist()
        ordered = [row for first in order for row in range(first * group, (first + 1) * group)]
        for start in range(0, rows, size):
            yield ordered[start : start + size]

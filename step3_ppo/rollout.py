"""One rollout: sample responses, score them, and keep everything that the update needs. No gradients."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.data import pad_rows
from common.distributed import device, gather_rows, rank
from common.engine import gathered
from common.formatting import dialogue_segments
from common.models import base_model, last_positions, response_logits, token_scores
from common.options import world_size
from common.tensor_ops import label_logprobs
from step3_ppo.data import Prompt
from step3_ppo.models import Models
from step3_ppo.options import PPOOptions
from step3_ppo.sampling import Responses, sample_responses, uniforms_for


@dataclass(frozen=True)
class Rollout:
    """B responses with all that was measured when they were drawn; the same on every rank, in the order of
    prompts.

    Token t of a response stands in column t of every (B, R) tensor; what follows the end is 0. `logprobs`,
    `ref_logprobs` and `values` are of the state before that token is chosen.
    """

    input_ids: Tensor  # (B, P + R) prompt and response without a gap, padded on the right
    prompt_lengths: Tensor  # (B,)
    response_lengths: Tensor  # (B,) at least 1; EOS counts
    ended: Tensor  # (B,) bool: the response has an EOS
    logprobs: Tensor  # (B, R) under the actor
    ref_logprobs: Tensor  # (B, R) under the reference
    values: Tensor  # (B, R) of the critic
    scores: Tensor  # (B,) of the reward model

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


@torch.no_grad()
def collect_rollout(
    models: Models, prompts: Sequence[Prompt], options: PPOOptions, step: int, with_values: bool = True
) -> tuple[Rollout, dict[str, float]]:
    """Respond to the prompts and score the responses, every rank a part of them; returns seconds per phase
    too.

    step: together with the seed and the row's number it decides what is sampled. The number of prompts must
    be a multiple of the number of ranks.
    """
    models.actor.eval()
    models.critic.eval()
    # Prompts of like length are generated together, and every rank gets its share of short and of long ones.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    mine = order[rank() :: world_size()]
    start = time.perf_counter()
    part = _sample(models, prompts, mine, options, step)
    sampled = time.perf_counter()
    part = _score(models, [prompts[i] for i in mine], part, options, with_values)
    scored = time.perf_counter()
    owners = [i for r in range(world_size()) for i in order[r :: world_size()]]
    return _gather(part, owners), {"time/rollout": sampled - start, "time/score": scored - sampled}


def response_positions(prompt_lengths: Tensor, response_lengths: Tensor, width: int) -> Tensor:
    """Where the state before each response token is, from the prompt's last token on: (B, width) bool."""
    column = torch.arange(width, device=prompt_lengths.device)
    first = (prompt_lengths - 1)[:, None]
    return (column >= first) & (column < first + response_lengths[:, None])


@dataclass(frozen=True)
class Rows:
    """Some rows of a rollout as a model reads them, cut to the longest of them."""

    input_ids: Tensor  # (b, T) padded on the right
    positions: Tensor  # (b, T) bool: the states before the N response tokens
    labels: Tensor  # (N,) those tokens


def actor_logprobs(model: torch.nn.Module, rows: Rows, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the response tokens of some rows, (N,), and the logits (N, V) behind them."""
    logits = response_logits(model, rows.input_ids, rows.positions)
    return label_logprobs(logits, rows.labels, temperature), logits


def take_rows(rollout: Rollout, rows: Sequence[int]) -> Rows:
    """Cut the rows out of a rollout, without the padding that only longer rows need."""
    index = torch.tensor(rows, device=rollout.input_ids.device)
    prompts, responses = rollout.prompt_lengths[index], rollout.response_lengths[index]
    width = int((prompts + responses).max())
    input_ids = rollout.input_ids[index, :width]
    positions = response_positions(prompts, responses, width)
    return Rows(input_ids, positions, input_ids[positions.roll(1, dims=1)])


def _sample(
    models: Models, prompts: Sequence[Prompt], mine: Sequence[int], options: PPOOptions, step: int
) -> Rollout:
    """This rank's rows with their tokens and log-probabilities; the rest is still to be measured."""
    tokenizer, size = models.encoder.tokenizer, options.generation_batch_size
    prompt_width = max(len(prompt.ids) for prompt in prompts)
    parts: list[Responses] = []
    with gathered(models.actor, options.gather_for_generation) as module:
        for chunk in (mine[i : i + size] for i in range(0, len(mine), size)):
            uniforms = uniforms_for(options.seed, step, chunk, options.max_response_length).to(device())
            parts.append(
                sample_responses(
                    base_model(module),
                    [prompts[i].ids for i in chunk],
                    uniforms,
                    options.temperature,
                    options.top_p,
                    tokenizer.eos_token_id,
                    tokenizer.pad_token_id,
                    synced=models.actor.zero_optimization_stage() == 3 and not options.gather_for_generation,
                )
            )
    responses = Responses(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    rows = [
        prompts[i].ids + ids[:length].tolist()
        for i, ids, length in zip(mine, responses.ids, responses.lengths.tolist(), strict=True)
    ]
    width = prompt_width + options.max_response_length  # the same on every rank
    rows[0] = rows[0] + [tokenizer.pad_token_id] * (width - len(rows[0]))
    unmeasured = torch.zeros_like(responses.logprobs)
    return Rollout(
        input_ids=pad_rows(rows, tokenizer.pad_token_id).to(device()),
        prompt_lengths=torch.tensor([len(prompts[i].ids) for i in mine], device=device()),
        response_lengths=responses.lengths,
        ended=responses.ended,
        logprobs=responses.logprobs,
        ref_logprobs=unmeasured,
        values=unmeasured,
        scores=unmeasured[:, 0],
    )


def _score(
    models: Models, prompts: Sequence[Prompt], part: Rollout, options: PPOOptions, with_values: bool
) -> Rollout:
    """Measure this rank's rows with the other models."""

    def logprobs_of(model: torch.nn.Module) -> Tensor:
        return _per_token(part, options, lambda rows: actor_logprobs(model, rows, options.temperature)[0])

    if next(models.actor.module.parameters()).dtype != torch.float32:
        # In 16 bits, generation with a cache rounds otherwise than the update's forward pass: measure as the
        # update does.
        part = replace(part, logprobs=logprobs_of(models.actor))
    with models.reference_model() as reference:
        part = replace(part, ref_logprobs=logprobs_of(reference))
    with models.reward_model() as reward:
        part = replace(part, scores=_scores(reward, models, prompts, part, options))
    if with_values:
        values = _per_token(
            part, options, lambda rows: token_scores(models.critic, rows.input_ids, rows.positions)
        )
        part = replace(part, values=values)
    return part


def _per_token(part: Rollout, options: PPOOptions, measure: Callable[[Rows], Tensor]) -> Tensor:
    """Apply `measure`, rows -> (N,), to all rows in batches of like length; the results in place, (B, R)."""
    lengths = (part.prompt_lengths + part.response_lengths).tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    result = torch.zeros_like(part.logprobs)
    mask = part.response_mask
    for start in range(0, len(order), options.generation_batch_size):
        chunk = order[start : start + options.generation_batch_size]
        index = torch.tensor(chunk, device=result.device)
        block = torch.zeros_like(result[index])
        block[mask[index]] = measure(take_rows(part, chunk))
        result[index] = block
    return result


def _scores(
    reward: torch.nn.Module, models: Models, prompts: Sequence[Prompt], part: Rollout, options: PPOOptions
) -> Tensor:
    """Scores (B,) of whole responses, read at an EOS: one is added to a response that has none, for scoring
    only, because the reward model has never learnt what to say elsewhere.
    """
    encoder = models.reward_encoder or models.encoder
    # Other tokens may need more positions than the model has: a long prompt then loses its beginning.
    room = getattr(base_model(reward).config, "max_position_embeddings", sys.maxsize)
    rows = []
    for number, prompt in enumerate(prompts):
        ids, response = part.prompt(number), part.response(number)
        if models.reward_encoder is None:
            rows.append(ids + response + ([] if part.ended[number] else [encoder.eos_token_id]))
        else:
            text = models.encoder.decode_response(ids, response)
            if not isinstance(prompt.source, str):
                text = text.strip()  # its own template decides about the space before a message
            segments = dialogue_segments(prompt.source, text, encoder.render, encoder.tokenizer.eos_token)
            rows.append(encoder.encode(segments)[0][-room:])
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = torch.zeros(len(rows), device=device())
    for start in range(0, len(order), options.generation_batch_size):
        chunk = order[start : start + options.generation_batch_size]
        input_ids = pad_rows([rows[i] for i in chunk], encoder.tokenizer.pad_token_id).to(device())
        lengths = torch.tensor([len(rows[i]) for i in chunk], device=device())
        scores[torch.tensor(chunk, device=device())] = token_scores(
            reward, input_ids, last_positions(lengths, input_ids.shape[1])
        )
    return scores


def _gather(part: Rollout, owners: Sequence[int]) -> Rollout:
    """All rows on every rank, in the order of prompts. owners: the prompt of each gathered row."""
    index = torch.tensor(owners, device=device()).argsort()
    fields = {name: torch.cat(gather_rows(value))[index] for name, value in vars(part).items()}
    whole = Rollout(**fields)
    width = int((whole.prompt_lengths + whole.response_lengths).max())
    longest = int(whole.response_lengths.max())
    per_token = {name: fields[name][:, :longest] for name in ("logprobs", "ref_logprobs", "values")}
    return replace(whole, input_ids=whole.input_ids[:, :width], **per_token)

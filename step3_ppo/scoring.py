"""Scoring of a rollout: log-probabilities, values and scores."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import compress

import torch
from torch import Tensor, nn

from common.data.batching import Tokens, batches_of_own, micro_batch, rows_of
from common.model.engine_protocol import Engine
from common.model.forward import token_scores
from common.model.reward_ensemble import combine, member_scores
from common.runtime.distributed import device, gather_rows, rank
from common.runtime.options import world_size
from common.text.conversation import PROBE, Segment
from common.text.prompts import Prompt
from common.text.segments import dialogue_segments, find_prompt
from common.text.tokenizer import SegmentEncoder
from step3_ppo.gap import is_rescored
from step3_ppo.models import Models, Scorer
from step3_ppo.options import PPOOptions
from step3_ppo.process_rewards import find_steps, score_steps
from step3_ppo.reward_functions import function_scores
from step3_ppo.rewards import aggregate_steps
from step3_ppo.rollout import Rollout, policy_pass


@dataclass(frozen=True)
class Scores:
    """Scores of B responses, the same on every rank; see `Rollout`."""

    scores: Tensor  # (B,)
    score_parts: Tensor  # (B, M + F + P)
    step_scores: Tensor  # (B, R)
    step_ends: Tensor  # (B, R)


@torch.no_grad()
def score_rollout(
    models: Models, prompts: Sequence[Prompt], rollout: Rollout, options: PPOOptions,
    with_values: bool = True, title: str = "",
) -> Rollout:  # fmt: skip
    """Compute log-probabilities, values and scores of the responses, each rank a part of them.

    with_values: also of the critic, if there is one. title: of the progress lines of the reward models; none
    when empty.
    """
    models.actor.eval()
    if models.critic:
        models.critic.eval()
    size = micro_batch(options, options.generation_batch_size)
    batches = _rank_batches(rollout, size)
    rank_rows = sum(batches, [])

    def logprobs(model: nn.Module) -> Tensor:
        parts = [policy_pass(model, rollout.rows(rows), options.temperature).logprobs for rows in batches]
        return rollout.scatter(batches, parts)

    with models.reference_model() as reference:
        fields = {"ref_logprobs": logprobs(reference)}
    scorer, encoder = models.scorer, models.encoder
    fields |= vars(score_responses(scorer, encoder, prompts, rollout, rank_rows, size, title))
    if is_rescored(models):  # as the update computes them
        fields["logprobs"] = logprobs(models.actor)
    if with_values and models.critic:
        fields |= _values(models.critic, rollout, batches, options)
    return replace(rollout, **fields)


@torch.no_grad()
def score_again(
    critic: Engine, scorer: Scorer, encoder: SegmentEncoder, prompts: Sequence[Prompt], rollout: Rollout,
    options: PPOOptions,
) -> Rollout:  # fmt: skip
    """The same responses with the scores of another scorer, and the values of its critic.

    encoder: of the policy.
    """
    critic.eval()
    size = micro_batch(options, options.generation_batch_size)
    batches = _rank_batches(rollout, size)
    scored = score_responses(scorer, encoder, prompts, rollout, sum(batches, []), size)
    return replace(rollout, **vars(scored), **_values(critic, rollout, batches, options))


@torch.no_grad()
def score_responses(
    scorer: Scorer, encoder: SegmentEncoder, prompts: Sequence[Prompt], rollout: Rollout,
    rank_rows: Sequence[int], size: int | Tokens, title: str = "",
) -> Scores:  # fmt: skip
    """Score the responses by all reward models, functions and the process model.

    encoder: of the policy. rank_rows: the rows that this rank scores. title: of progress lines; none when
    empty.
    """
    rank_parts = [*_member_scores(scorer, encoder, prompts, rollout, rank_rows, size, title)]
    rank_parts += [*_function_scores(scorer, encoder, prompts, rollout, rank_rows)]
    stacked = torch.stack(rank_parts, 1) if rank_parts else torch.zeros(len(rank_rows), 0, device=device())
    parts = gather_rows(stacked, rank_rows, len(prompts))  # (B, M + F)
    scores = combine_parts(parts, scorer)
    if scorer.process is None:
        return Scores(scores, parts, rollout.step_scores, rollout.step_ends)
    weight, how = scorer.process.weight, scorer.process.aggregation
    logprobs, ends = _step_scores(scorer, encoder, prompts, rollout, rank_rows, size, title)  # (B, R)
    of_steps = aggregate_steps(logprobs, ends, how)  # (B,)
    parts = torch.cat([parts, of_steps[:, None]], dim=1)
    return Scores(scores + weight * of_steps, parts, weight * logprobs, ends)


def combine_parts(parts: Tensor, scorer: Scorer) -> Tensor:
    """The score of each response from its parts (B, M + F): that of the ensemble, and the weighted functions.

    Returns (B,).
    """
    of_members, of_functions = parts[:, : len(scorer.rewards)], parts[:, len(scorer.rewards) :]
    scores = parts.new_zeros(len(parts))
    # One by one: a matrix product would round equal rows differently.
    for function, part in zip(scorer.functions, of_functions.T, strict=True):
        scores = scores + function.weight * part
    return scores + combine(of_members.T, scorer.options) if scorer.rewards else scores


def _values(
    critic: Engine, rollout: Rollout, batches: list[list[int]], options: PPOOptions
) -> dict[str, Tensor]:
    """The values of a rollout, before each response token and after the last one, by field."""
    passes = [_value_pass(critic, rollout, batch, options) for batch in batches]
    last = torch.cat([last for _, last in passes])
    return {
        "values": rollout.scatter(batches, [values for values, _ in passes]),
        "last_values": gather_rows(last, sum(batches, []), len(rollout.scores)),
    }


def _value_pass(
    critic: Engine, rollout: Rollout, batch: list[int], options: PPOOptions
) -> tuple[Tensor, Tensor]:
    """Values (N,) before each response token, and (b,) after the last token of truncated responses with
    --bootstrap_truncated, else 0.
    """
    rows = rollout.rows(batch)
    positions = tuple(map(torch.cat, zip(rows.positions, rows.ends, strict=True)))
    scores = token_scores(critic, rows.input_ids, positions, **rows.layout(critic))
    values, last = scores.split([len(rows.labels), len(batch)])
    bootstrap = ~rollout.ended[batch] & options.bootstrap_truncated  # (b,)
    return values, torch.where(bootstrap, last, 0.0)


def _rank_batches(rollout: Rollout, size: int | Tokens) -> list[list[int]]:
    """This rank's rows, in batches of similar length."""
    units, lengths = rollout.units(range(len(rollout.scores)))
    by_length = sorted(range(len(units)), key=lengths.__getitem__)
    rank_units = by_length[rank() :: world_size()]
    parts = batches_of_own([lengths[unit] for unit in rank_units], rows_of(size, rollout.sharing.responses))
    return [[row for i in part for row in units[rank_units[i]]] for part in parts]


def _function_scores(
    scorer: Scorer, encoder: SegmentEncoder, prompts: Sequence[Prompt], rollout: Rollout,
    rank_rows: Sequence[int],
) -> Tensor:  # fmt: skip
    """Scores (F, b) of this rank's b rows by F reward functions."""
    if not scorer.functions:
        return torch.zeros(0)
    texts = [encoder.decode_response(rollout.prompt(row), rollout.reply(row)) for row in rank_rows]
    records = [prompts[row].record for row in rank_rows]
    scores = function_scores(scorer.functions, [find_prompt(record) for record in records], texts, records)
    return torch.tensor(scores, device=device())


def _member_scores(
    scorer: Scorer, encoder: SegmentEncoder, prompts: Sequence[Prompt], rollout: Rollout,
    rank_rows: Sequence[int], size: int | Tokens, title: str,
) -> Tensor:  # fmt: skip
    """Scores (M, b) of this rank's b rows by M reward models."""
    inputs = {
        e: [_scored_ids(e, encoder, prompts[row], rollout, row) for row in rank_rows]
        for e in {member.encoder for member in scorer.rewards}
    }
    return member_scores(scorer.rewards, inputs, size, title, rollout.sharing)


def _step_scores(
    scorer: Scorer, encoder: SegmentEncoder, prompts: Sequence[Prompt], rollout: Rollout,
    rank_rows: Sequence[int], size: int | Tokens, title: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability that each step is right (B, R), and the mask of the steps' last tokens (B, R)."""
    separator, responses = scorer.process.separator, []
    for row in rank_rows:
        is_conversation = not isinstance(find_prompt(prompts[row].record), str)
        ids = _scored_ids(encoder, encoder, prompts[row], rollout, row)
        lengths = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        closing = len(closing_ids(encoder, is_conversation))
        responses.append(find_steps(ids, *lengths, closing, separator, encoder.decode))
    width = rollout.step_scores.shape[1]
    logprobs, ends = score_steps(scorer.process, responses, width, size, title)
    ends = gather_rows(ends.int(), rank_rows, len(prompts)).bool()
    return gather_rows(logprobs, rank_rows, len(prompts)), ends


def _scored_ids(
    encoder: SegmentEncoder, policy_encoder: SegmentEncoder, prompt: Prompt, rollout: Rollout, row: int
) -> list[int]:
    """Prompt and response in the reward model's tokens, closed as in its training data, up to EOS, where the
    score is read. A truncated response is closed too, for scoring only: the reward model has not been trained
    to score anywhere else.
    """
    ids, source = rollout.prompt(row), find_prompt(prompt.record)
    if encoder is policy_encoder:
        closing = closing_ids(encoder, is_conversation=not isinstance(source, str))
        return ids + close(rollout.response(row), bool(rollout.ended[row]), closing)
    text = policy_encoder.decode_response(ids, rollout.reply(row))
    if not isinstance(source, str):
        text = text.strip()  # the reward model's template adds the space before a message
    segments = dialogue_segments(source, text, encoder.render, encoder.tokenizer.eos_token)
    return encoder.encode(segments)[0]


@cache
def closing_ids(encoder: SegmentEncoder, is_conversation: bool) -> list[int]:
    """Tokens that follow a reply in training data: the end of turn of the chat template, if any, and EOS."""
    closing = Segment("", is_response=True, ends=True)
    if is_conversation:
        question = [{"role": "user", "content": PROBE}]
        with contextlib.suppress(ValueError):  # a template that refuses a single question and reply
            reply = dialogue_segments(question, PROBE, encoder.render, encoder.tokenizer.eos_token)[-1]
            closing = reply._replace(text=reply.text.partition(PROBE)[2])
    ids, is_closing = encoder.encode([Segment(""), closing])
    return [*compress(ids, is_closing)]


def close(response: list[int], has_ended: bool, closing: list[int]) -> list[int]:
    """Append `closing` to the response, without the part that it already ends with. Another end token is
    replaced.
    """
    for size in range(len(closing), 0, -1):
        if response[-size:] == closing[:size]:
            return response + closing[size:]
    return (response[:-1] if has_ended else response) + closing

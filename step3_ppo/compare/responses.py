"""Responses of policies, and their scores by judges, with one model in memory at a time."""

import gc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.data.batching import batches_of_rank
from common.generation.generate import load_policy, make_sampler
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import load_members
from common.runtime.distributed import gather_rows, rank, sum_over_ranks
from common.runtime.options import UserError, world_size
from common.runtime.progress import track
from common.text.prompts import Prompt
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import MaskedText
from step3_ppo.compare.options import ComparePoliciesOptions
from step3_ppo.metrics import EVALUATION_STEP
from step3_ppo.models import Scorer
from step3_ppo.ptx import demonstration_logprobs
from step3_ppo.reward_functions import RewardFunction
from step3_ppo.rollout import Rollout, policy_pass, sample_rollout
from step3_ppo.scoring import score_responses


class Judge(NamedTuple):
    """A named score: a reward-model ensemble, functions, or their sum."""

    name: str
    ensemble: EnsembleOptions
    encoders: list[SegmentEncoder]
    functions: list[RewardFunction]


class Policy(NamedTuple):
    """Responses of a policy to B prompts, their log-probabilities, and its perplexity on demonstrations."""

    path: str
    rollouts: list[Rollout]  # more than one for best of n
    logprobs: Tensor  # (B,) of each response of the first rollout
    ref_logprobs: Tensor  # (B,) under the first policy
    perplexity: float | None


def sample_all(
    options: ComparePoliciesOptions, encoder: SegmentEncoder, prompts: Sequence[Prompt],
    texts: Sequence[MaskedText], zero: dict[str, Any],
) -> list[Policy]:  # fmt: skip
    """Sample from every policy in reverse order: the first one then also scores the responses of all."""
    policies: list[Policy] = []
    for number in reversed(range(len(options.model_name_or_path))):
        path = options.model_name_or_path[number]
        model = load_policy(path, encoder, zero, options.ilql_beta)
        sampler, rollouts = make_sampler(model, path, options), []
        for draw in range(1 if number else max(1, options.best_of)):
            title = f"{path}: responses"
            rollouts.append(sample_rollout(sampler, encoder, prompts, options, EVALUATION_STEP + draw, title))
        logprobs = response_logprobs(model, rollouts[0], options)
        text_perplexity = perplexity(model, texts, options.micro_batch_size) if texts else None
        policies.insert(0, Policy(path, rollouts, logprobs, logprobs, text_perplexity))
        if number == 0:
            policies = [
                policy._replace(ref_logprobs=response_logprobs(model, policy.rollouts[0], options))
                for policy in policies
            ]
        del model, sampler
        gc.collect()
        torch.cuda.empty_cache()
    return policies


def rows_of_rank(rollout: Rollout) -> list[int]:
    """This rank's rows, shortest first."""
    lengths = rollout.lengths.tolist()
    return sorted(range(len(lengths)), key=lengths.__getitem__)[rank() :: world_size()]


@torch.no_grad()
def response_logprobs(model: nn.Module, rollout: Rollout, options: ComparePoliciesOptions) -> Tensor:
    """Log-probability of each response, (B,) fp64; each rank computes a part."""
    rank_rows, size = rows_of_rank(rollout), options.generation_batch_size
    totals: list[Tensor] = []
    batches = [rank_rows[start : start + size] for start in range(0, len(rank_rows), size)]
    for batch in track("log-probabilities of responses", batches, len(rank_rows) * world_size()):
        logprobs = policy_pass(model, rollout.rows(batch), options.temperature).logprobs  # (N,)
        lengths = rollout.response_lengths[batch].tolist()
        totals += [part.sum() for part in logprobs.double().split(lengths)]
    return gather_rows(torch.stack(totals), rank_rows, len(rollout.scores))


@torch.no_grad()
def perplexity(model: nn.Module, rows: Sequence[MaskedText], micro_batch: int) -> float:
    """Perplexity over all response tokens of the demonstrations: how much a policy has forgotten."""
    total = count = 0.0
    batches = batches_of_rank([row.length for row in rows], micro_batch)
    for batch, is_real in track("perplexity of demonstrations", batches, len(rows)):
        logprobs = demonstration_logprobs(model, [rows[i] for i in batch])  # (N,)
        if is_real:
            total, count = total + logprobs.double().sum().item(), count + len(logprobs)
    total, count = sum_over_ranks(total, count)
    return math.exp(min(-total / count, 700.0))


def score(
    judge: Judge, policies: Sequence[Policy], encoder: SegmentEncoder, prompts: Sequence[Prompt],
    options: ComparePoliciesOptions, zero: dict[str, Any],
) -> list[np.ndarray]:  # fmt: skip
    """Scores by a judge of D responses to each prompt, (D, B) for each policy.

    Raises UserError for a score that is not a finite number.
    """
    members = load_members(judge.ensemble, judge.encoders, zero)
    scorer, size = Scorer(members, judge.functions, judge.ensemble), options.generation_batch_size
    scores = []
    for policy in policies:
        title = f"{judge.name}, responses of {policy.path}"
        by_rollout = [
            score_responses(scorer, encoder, prompts, rollout, rows_of_rank(rollout), size, title).scores
            for rollout in policy.rollouts
        ]
        scores.append(torch.stack(by_rollout).double().cpu().numpy())
    if bad := sum(int((~np.isfinite(part)).sum()) for part in scores):
        raise UserError(f"{judge.name}: {bad} scores are not finite numbers")
    return scores

"""What policies say to prompts, and what judges say of that, with one model held at a time."""

import gc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.data.batching import deal
from common.generation.generate import load_policy
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import load_members
from common.runtime.distributed import gather_rows, rank, sum_over_ranks
from common.runtime.options import UserError, world_size
from common.runtime.progress import track
from common.text.prompts import Prompt
from common.text.tokenizer import SegmentEncoder
from step3_ppo.compare.options import EvaluateOptions
from step3_ppo.metrics import EVALUATION_STEP
from step3_ppo.models import Scorer
from step3_ppo.ptx import Text, demonstration_logprobs
from step3_ppo.reward_functions import RewardFunction
from step3_ppo.rollout import Rollout, policy_pass, sample_rollout, take_rows
from step3_ppo.scoring import score_responses


class Judge(NamedTuple):
    """Reward models whose scores become one, or functions, or both added up."""

    name: str
    ensemble: EnsembleOptions
    encoders: list[SegmentEncoder]
    functions: list[RewardFunction]


class Policy(NamedTuple):
    """What a policy has said to B prompts, and how likely it found that and the demonstrations."""

    path: str
    rollouts: list[Rollout]  # more than one where the best of several is looked at
    logprobs: Tensor  # (B,) of each whole response of the first rollout
    ref_logprobs: Tensor  # (B,) under the first policy
    perplexity: float | None


def sample_all(
    options: EvaluateOptions, encoder: SegmentEncoder, prompts: Sequence[Prompt], texts: Sequence[Text],
    zero: dict[str, Any],
) -> list[Policy]:  # fmt: skip
    """Have every policy respond, one held at a time; the first is the last, to read what all have said."""
    policies: list[Policy] = []
    for number in reversed(range(len(options.model_name_or_path))):
        path = options.model_name_or_path[number]
        model = load_policy(path, encoder, zero)
        rollouts = []
        for draw in range(1 if number else max(1, options.best_of)):
            title = f"{path}: responses"
            rollouts.append(sample_rollout(model, encoder, prompts, options, EVALUATION_STEP + draw, title))
        logprobs = response_logprobs(model, rollouts[0], options)
        pad_token_id = encoder.tokenizer.pad_token_id
        found = perplexity(model, texts, options.micro_batch_size, pad_token_id) if texts else None
        policies.insert(0, Policy(path, rollouts, logprobs, logprobs, found))
        if number == 0:
            policies = [
                policy._replace(ref_logprobs=response_logprobs(model, policy.rollouts[0], options))
                for policy in policies
            ]
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return policies


def my_rows(rollout: Rollout) -> list[int]:
    """This rank's rows, the shorter ones first."""
    lengths = rollout.lengths.tolist()
    return sorted(range(len(lengths)), key=lengths.__getitem__)[rank() :: world_size()]


@torch.no_grad()
def response_logprobs(model: nn.Module, rollout: Rollout, options: EvaluateOptions) -> Tensor:
    """Log-probability of each whole response, (B,) fp64, every rank reading a part of them."""
    mine, size = my_rows(rollout), options.generation_batch_size
    totals: list[Tensor] = []
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    for batch in track("log-probabilities of responses", batches, len(mine) * world_size()):
        logprobs = policy_pass(model, take_rows(rollout, batch), options.temperature).logprobs  # (N,)
        lengths = rollout.response_lengths[batch].tolist()
        totals += [part.sum() for part in logprobs.double().split(lengths)]
    return gather_rows(torch.stack(totals), mine, len(rollout.scores))


@torch.no_grad()
def perplexity(model: nn.Module, rows: Sequence[Text], micro_batch: int, pad_token_id: int) -> float:
    """Over all response tokens of some demonstrations: how much of them a policy has forgotten."""
    total = count = 0.0
    lengths = [row.length for row in rows]
    batches = deal(range(len(rows)), lengths, micro_batch, rank(), world_size())
    for picked in track("reading demonstrations", batches, len(rows)):
        # A rank without rows in the last round still takes part in it: at ZeRO-3 a forward needs every rank.
        logprobs = demonstration_logprobs(model, [rows[i] for i in picked or [0]], pad_token_id)  # (N,)
        if picked:
            total, count = total + logprobs.double().sum().item(), count + len(logprobs)
    total, count = sum_over_ranks(total, count)
    return math.exp(min(-total / count, 700.0))


def score(
    judge: Judge, policies: Sequence[Policy], encoder: SegmentEncoder, prompts: Sequence[Prompt],
    options: EvaluateOptions, zero: dict[str, Any],
) -> list[np.ndarray]:  # fmt: skip
    """What a judge says of D responses to each prompt, (D, B) for each policy.

    Raises UserError for a score that is not a finite number.
    """
    members = load_members(judge.ensemble, judge.encoders, zero)
    scorer, size = Scorer(members, judge.functions, judge.ensemble), options.generation_batch_size
    scores = []
    for policy in policies:
        title = f"{judge.name}, responses of {policy.path}"
        said = [
            score_responses(scorer, encoder, prompts, rollout, my_rows(rollout), size, title)[0]
            for rollout in policy.rollouts
        ]
        scores.append(torch.stack(said).double().cpu().numpy())
    if bad := sum(int((~np.isfinite(part)).sum()) for part in scores):
        raise UserError(f"{judge.name}: {bad} scores are not finite numbers")
    return scores

"""Evaluation on held-out prompts, and metrics of rollouts."""

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

import torch
from torch import Tensor

from common.data.batching import micro_batch
from common.numeric.tensor_ops import masked_mean, masked_var
from common.runtime.distributed import rank, sum_over_ranks
from common.runtime.options import world_size
from common.text.prompts import Prompt
from common.training.means import Mean
from step3_ppo.models import Models, Scorer
from step3_ppo.objectives import comparable_scores
from step3_ppo.options import PPOOptions
from step3_ppo.process_rewards import describe_steps
from step3_ppo.rewards import repeated_share, token_kl
from step3_ppo.rollout import Rollout, sample_rollout
from step3_ppo.scoring import score_responses, score_rollout
from step3_ppo.state import PPOState

PERCENTILES = torch.tensor([0.1, 0.5, 0.9])
# A sampling step beyond training: every evaluation uses the same random numbers.
EVALUATION_STEP = 1 << 40


def evaluate(
    models: Models, prompts: Sequence[Prompt], options: PPOOptions, state: PPOState
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics on one response to each held-out prompt, and the first samples with their scores."""
    padded = [*prompts, *prompts[:1] * (-len(prompts) % world_size())]  # every rank has as many
    title = "responses to held-out prompts"
    rollout = sample_rollout(models.sampler, models.encoder, padded, options, EVALUATION_STEP, title)
    rollout = score_rollout(models, padded, rollout, options, with_values=False, title=f"scores of {title}")
    rank_rows, judged = range(rank(), len(padded), world_size()), {}
    size = micro_batch(options, options.generation_batch_size)
    for name, judge in models.judges.items():
        scored = score_responses(
            judge, models.encoder, padded, rollout, rank_rows, size, f"{name} scores of {title}"
        )
        judged[name] = scored.scores[: len(prompts)]
    rollout = rollout.pick(range(len(prompts)))
    rollout = comparable_scores(rollout, models.scorer, options, state)
    figures = {
        "eval/score": rollout.scores.mean().item(),
        "eval/score_std": rollout.scores.std(unbiased=False).item(),
        **{f"eval/score_{name}": part for name, part in part_means(models.scorer, rollout).items()},
        "eval/kl": response_kl(rollout),
        **{f"eval/{name}": scores.mean().item() for name, scores in judged.items()},
        **{f"eval/{name}": value for name, value in describe_responses(rollout).items()},
    }
    return figures, samples(models, rollout, judged, options.num_samples)


def rollout_metrics(models: Models, rollout: Rollout, returns: Tensor | None) -> dict[str, Mean]:
    """Metrics of a training rollout. returns: (B, R), None without a critic."""
    process = models.scorer.process
    low, median, high = rollout.scores.float().quantile(PERCENTILES.to(rollout.scores)).tolist()
    metrics = {
        "reward/mean": rollout.scores.mean().item(),
        "reward/std": rollout.scores.std(unbiased=False).item(),
        "reward/p10": low,
        "reward/median": median,
        "reward/p90": high,
        **describe_parts(models.scorer, rollout),
        **(describe_steps(process, rollout.step_scores, rollout.step_ends) if process else {}),
        "kl/mean": response_kl(rollout),
        **kl_by_quarter(rollout),
        "policy/perplexity": masked_mean(rollout.logprobs, rollout.response_mask).neg().exp().item(),
        **({} if returns is None else describe_values(rollout, returns)),
        **{f"response/{name}": value for name, value in describe_responses(rollout).items()},
    }
    return {name: Mean(value) for name, value in metrics.items()}


def part_means(scorer: Scorer, rollout: Rollout) -> dict[str, float]:
    """The mean score by each reward model, named by its number, function, and process model, if several."""
    names = [*map(str, range(1, len(scorer.rewards) + 1)), *(function.name for function in scorer.functions)]
    names += ["process"] * (scorer.process is not None)
    return dict(zip(names, rollout.score_parts.mean(0).tolist(), strict=True)) if len(names) > 1 else {}


def describe_parts(scorer: Scorer, rollout: Rollout) -> dict[str, float]:
    """Mean and std of each part of the scores if there are several, and the std between reward models."""
    means, parts, count = part_means(scorer, rollout), rollout.score_parts, len(scorer.rewards)
    figures = {f"reward/mean_{name}": mean for name, mean in means.items()}
    for name, std in zip(means, parts.std(0, unbiased=False).tolist(), strict=False):
        figures[f"reward/std_{name}"] = std
    if count > 1:
        figures["reward/std_between"] = parts[:, :count].std(1, unbiased=False).mean().item()
    return figures


def describe_values(rollout: Rollout, returns: Tensor, name: str = "value") -> dict[str, float]:
    """Explained variance of the returns (B, R), and the mean value. name: of the critic in metrics."""
    mask = rollout.response_mask
    unexplained = masked_var(returns - rollout.values, mask) / masked_var(returns, mask).clamp(min=1e-8)
    mean = masked_mean(rollout.values, mask).item()
    return {f"{name}/explained_var": 1.0 - unexplained.item(), f"{name}/mean": mean}


def response_kl(rollout: Rollout) -> float:
    """KL against the reference: the k1 estimate summed over the response, averaged over responses."""
    return token_kl(rollout.logprobs, rollout.ref_logprobs, rollout.response_mask).sum(1).mean().item()


def kl_by_quarter(rollout: Rollout) -> dict[str, float]:
    """KL per token, the k1 estimate, in the first to the last quarter of each response."""
    kl, mask = token_kl(rollout.logprobs, rollout.ref_logprobs, rollout.response_mask), rollout.response_mask
    column = torch.arange(mask.shape[1], device=mask.device)
    quarters = 4 * column // rollout.response_lengths[:, None]  # (B, R)
    return {f"kl/quarter_{q + 1}": masked_mean(kl, mask & (quarters == q)).item() for q in range(4)}


def speed(rollout: Rollout, seconds: Sequence[float], updates: float, options: PPOOptions) -> dict[str, Mean]:
    """Time and tokens per second of the phases: response tokens in the rollout, all tokens in the others.
    Also the useful share of the positions computed in the rollout, without padding and finished responses;
    a prompt with several responses is needed once.

    seconds: of sampling, scoring and training. updates: optimiser steps made.
    """
    passes = options.ppo_epochs * updates / options.updates_per_step  # over the rollout
    tokens = int(rollout.lengths.sum())
    amounts = int(rollout.response_lengths.sum()), tokens, tokens * passes
    prompts = {tuple(rollout.prompt(row)) for row in range(len(rollout.lengths))}
    inputs = rollout.response_lengths - 1  # the last token of a response is sampled, but not an input
    useful = sum(map(len, prompts)) + int(inputs.sum())
    share = Mean(useful, int(rollout.computed.sum()))
    metrics = {"time/step": Mean(sum(seconds)), "rollout/useful_share": share}
    for name, spent, amount in zip(("rollout", "score", "train"), seconds, amounts, strict=True):
        metrics |= {f"time/{name}": Mean(spent), f"{name}/tokens_per_second": Mean(amount, spent)}
    return metrics


def describe_responses(rollout: Rollout) -> dict[str, float]:
    """Length in tokens, share with EOS, distinct-1, distinct-2, and share of repeated trigrams.

    distinct_2: distinct bigrams / all bigrams of a response, averaged over responses (Li et al. 2016, but per
    response, so that it does not depend on their number).
    """
    count = len(rollout.scores)
    responses = [rollout.response(row) for row in range(count)[rank() :: world_size()]]
    totals = [fsum(repeated_share(ids, size) for ids in responses) for size in (1, 2, 3)]
    repeated = [total / count for total in sum_over_ranks(*totals)]
    return {
        "length": rollout.response_lengths.float().mean().item(),
        "eos_rate": rollout.ended.float().mean().item(),
        "distinct_1": 1.0 - repeated[0],
        "distinct_2": 1.0 - repeated[1],
        "repeated_3": repeated[2],
    }


def samples(
    models: Models, rollout: Rollout, judged: Mapping[str, Tensor], count: int
) -> list[dict[str, Any]]:
    """Records of the first responses. judged: by name, other scores (B,)."""
    records = []
    for row in range(min(count, len(rollout.scores))):
        prompt = rollout.prompt(row)
        records.append({
            "prompt": models.encoder.decode_prompt(prompt),
            "response": models.encoder.decode_response(prompt, rollout.reply(row)),
            "score": rollout.scores[row].item(),
            **{name: scores[row].item() for name, scores in judged.items()},
            "length": int(rollout.response_lengths[row]),
            "ended": rollout.ended[row].item(),
        })  # fmt: skip
    return records


def as_markdown(records: Sequence[dict[str, Any]]) -> str:
    """A table of samples."""
    lines = ["| score | prompt | response |", "|---|---|---|"]
    for one in records:
        texts = [one[name].replace("|", "\\|").replace("\n", " ") for name in ("prompt", "response")]
        lines.append(f"| {one['score']:.2f} | {texts[0]} | {texts[1]} |")
    return "\n".join(lines)

"""What a policy does on held-out prompts, and the figures that describe responses."""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from common.options import world_size
from common.tensor_ops import masked_mean, masked_var
from step3_ppo.data import Prompt
from step3_ppo.models import Models
from step3_ppo.options import PPOOptions
from step3_ppo.rewards import repeated_share, token_kl
from step3_ppo.rollout import Rollout, sample_rollout
from step3_ppo.scoring import score_rollout

PERCENTILES = torch.tensor([0.1, 0.5, 0.9])
# A sampling step that training never reaches: every evaluation draws the same numbers.
EVALUATION_STEP = 1 << 40


def evaluate(models: Models, prompts: Sequence[Prompt], options: PPOOptions) -> tuple[dict[str, float], str]:
    """Figures on one response to each held-out prompt, and a Markdown table of the first few."""
    short = -len(prompts) % world_size()
    prompts_of_all = [*prompts, *prompts[:1] * short]
    rollout = sample_rollout(models, prompts_of_all, options, EVALUATION_STEP)
    rollout, _ = score_rollout(models, prompts_of_all, rollout, options)
    rollout = Rollout(**{name: value[: len(prompts)] for name, value in vars(rollout).items()})
    figures = {
        "eval/score": rollout.scores.mean().item(),
        "eval/score_std": rollout.scores.std(unbiased=False).item(),
        "eval/kl": response_kl(rollout),
        **{f"eval/{name}": value for name, value in describe_responses(rollout).items()},
    }
    return figures, sample_table(models, rollout, options.num_samples)


def rollout_metrics(models: Models, rollout: Rollout, returns: Tensor | None) -> dict[str, float]:
    """The figures of one training rollout; returns (B, R) where there is a critic."""
    low, median, high = rollout.scores.float().quantile(PERCENTILES.to(rollout.scores)).tolist()
    return {
        "reward/mean": rollout.scores.mean().item(),
        "reward/std": rollout.scores.std(unbiased=False).item(),
        "reward/p10": low,
        "reward/median": median,
        "reward/p90": high,
        **describe_parts(models, rollout.score_parts),
        "kl/mean": response_kl(rollout),
        **({} if returns is None else describe_values(rollout, returns)),
        **{f"response/{name}": value for name, value in describe_responses(rollout).items()},
    }


def describe_parts(models: Models, parts: Tensor) -> dict[str, float]:
    """Mean of each part of the scores (B, M + F) if there are several; how far reward models are apart."""
    count = len(models.rewards)
    names = [*range(1, count + 1), *(function.name for function in models.functions)]
    if len(names) == 1:
        return {}
    means = {f"reward/mean_{name}": part.item() for name, part in zip(names, parts.mean(0), strict=True)}
    if count > 1:
        means["reward/std_between"] = parts[:, :count].std(1, unbiased=False).mean().item()
    return means


def describe_values(rollout: Rollout, returns: Tensor) -> dict[str, float]:
    """How much of the variance of the returns (B, R) the critic foresaw, and its mean."""
    mask = rollout.response_mask
    unexplained = masked_var(returns - rollout.values, mask) / masked_var(returns, mask).clamp(min=1e-8)
    mean = masked_mean(rollout.values, mask).item()
    return {"value/explained_var": 1.0 - unexplained.item(), "value/mean": mean}


def response_kl(rollout: Rollout) -> float:
    """KL against the reference: the k1 estimate summed over the response, averaged over responses."""
    return token_kl(rollout.logprobs, rollout.ref_logprobs, rollout.response_mask).sum(1).mean().item()


def describe_responses(rollout: Rollout) -> dict[str, float]:
    """Length in tokens, share that ended by themselves, distinct-2, and the share of repeated trigrams.

    distinct_2: different pairs of neighbouring tokens / all such pairs within a response, averaged over
    responses (Li et al. 2016, per response, so that it does not depend on how many there are).
    """
    responses = [rollout.response(row) for row in range(len(rollout.scores))]
    repeated_2, repeated_3 = (fmean(repeated_share(ids, size) for ids in responses) for size in (2, 3))
    return {
        "length": rollout.response_lengths.float().mean().item(),
        "eos_rate": rollout.ended.float().mean().item(),
        "distinct_2": 1.0 - repeated_2,
        "repeated_3": repeated_3,
    }


def sample_table(models: Models, rollout: Rollout, count: int) -> str:
    """The first responses with their scores, as Markdown."""
    lines = ["| score | prompt | response |", "|---|---|---|"]
    for row in range(min(count, len(rollout.scores))):
        prompt, response = rollout.prompt(row), rollout.response(row)
        texts = models.encoder.tokenizer.decode(prompt), models.encoder.decode_response(prompt, response)
        cells = [text.replace("|", "\\|").replace("\n", " ") for text in texts]
        lines.append(f"| {rollout.scores[row].item():.2f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)

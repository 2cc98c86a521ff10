"""What a policy does on held-out prompts, and the figures that describe responses."""

from collections.abc import Sequence

from torch import Tensor

from common.options import world_size
from common.tensor_ops import masked_mean, masked_var
from step3_ppo.data import Prompt
from step3_ppo.models import Models
from step3_ppo.options import PPOOptions
from step3_ppo.rewards import token_kl
from step3_ppo.rollout import Rollout, sample_rollout
from step3_ppo.scoring import score_rollout

EVALUATION_STEP = (
    1 << 40
)  # a sampling step that training never reaches: every evaluation draws the same numbers


def evaluate(models: Models, prompts: Sequence[Prompt], options: PPOOptions) -> tuple[dict[str, float], str]:
    """Figures on one response to each held-out prompt, and a Markdown table of the first few."""
    short = -len(prompts) % world_size()
    prompts_of_all = [*prompts, *prompts[:1] * short]
    rollout = sample_rollout(models, prompts_of_all, options, EVALUATION_STEP)
    rollout, *_ = score_rollout(models, prompts_of_all, rollout, options)
    rollout = Rollout(**{name: value[: len(prompts)] for name, value in vars(rollout).items()})
    figures = {
        "eval/score": rollout.scores.mean().item(),
        "eval/score_std": rollout.scores.std(unbiased=False).item(),
        "eval/kl": response_kl(rollout),
        **{f"eval/{name}": value for name, value in describe_responses(rollout).items()},
    }
    return figures, sample_table(models, rollout, options.num_samples)


def rollout_metrics(rollout: Rollout, returns: Tensor, of_members: Tensor) -> dict[str, float]:
    """The figures of one training rollout; returns (B, R), and the scores (M, B) of each reward model."""
    mask = rollout.response_mask
    unexplained = masked_var(returns - rollout.values, mask) / masked_var(returns, mask).clamp(min=1e-8)
    return {
        "reward/mean": rollout.scores.mean().item(),
        "reward/std": rollout.scores.std(unbiased=False).item(),
        **(describe_members(of_members) if len(of_members) > 1 else {}),
        "kl/mean": response_kl(rollout),
        "value/explained_var": 1.0 - unexplained.item(),
        "value/mean": masked_mean(rollout.values, mask).item(),
        **{f"response/{name}": value for name, value in describe_responses(rollout).items()},
    }


def describe_members(scores: Tensor) -> dict[str, float]:
    """Mean score of each reward model, and how far they are apart: scores (M, B)."""
    means = {f"reward/mean_{number}": mean for number, mean in enumerate(scores.mean(1).tolist(), start=1)}
    return means | {"reward/std_between": scores.std(0, unbiased=False).mean().item()}


def response_kl(rollout: Rollout) -> float:
    """KL against the reference: the k1 estimate summed over the response, averaged over responses."""
    return token_kl(rollout.logprobs, rollout.ref_logprobs, rollout.response_mask).sum(1).mean().item()


def describe_responses(rollout: Rollout) -> dict[str, float]:
    """Length in tokens, share that ended by themselves, and distinct-2.

    distinct_2: different pairs of neighbouring tokens / all such pairs within a response, averaged over
    responses (Li et al. 2016, per response, so that it does not depend on how many there are).
    """
    shares = []
    for row in range(len(rollout.scores)):
        ids = rollout.response(row)
        pairs = list(zip(ids, ids[1:], strict=False))
        shares.append(len(set(pairs)) / len(pairs) if pairs else 1.0)
    return {
        "length": rollout.response_lengths.float().mean().item(),
        "eos_rate": rollout.ended.float().mean().item(),
        "distinct_2": sum(shares) / len(shares),
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

"""From scores per response to rewards per token. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor


def repeated_share(ids: Sequence[int], size: int = 3) -> float:
    """Share of the n-grams of a response that are repetitions; 0 without n-grams."""
    ngrams = list(zip(*(ids[start:] for start in range(size)), strict=False))
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


@dataclass
class RunningScale:
    """Running mean and standard deviation of scores, to normalise them.

    Source: Chan et al. 1983, for batches; Zheng et al. 2023 (PPO-max), section 5.3.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def update(self, scores: Tensor) -> None:
        """Add the scores (B,) of a rollout."""
        scores = scores.double()  # in which equal scores have a deviation of 0
        number, mean = len(scores), scores.mean().item()
        distance, total = mean - self.mean, self.count + number
        self.squares += scores.var(unbiased=False).item() * number
        self.squares += distance**2 * self.count * number / total
        self.mean += distance * number / total
        self.count = total

    def apply(self, scores: Tensor) -> Tensor:
        """Normalised scores (B,): standard deviations from the mean. Equal scores are only centred."""
        std = math.sqrt(self.squares / self.count)
        return ((scores.double() - self.mean) / (std if std > 1e-8 else 1.0)).to(scores.dtype)


def scales_of(parts: Tensor) -> list[RunningScale]:
    """The scale of each of P parts of scores: (B, P) -> P scales."""
    scales = [RunningScale() for _ in parts.T]
    update_scales(scales, parts)
    return scales


def update_scales(scales: Sequence[RunningScale], parts: Tensor) -> None:
    """Add the parts (B, P) of a rollout's scores, each to its own scale."""
    for scale, part in zip(scales, parts.T, strict=True):
        scale.update(part)


def standardised(parts: Tensor, scales: Sequence[RunningScale]) -> Tensor:
    """Each of P parts of scores in standard deviations from its own mean: (B, P) -> (B, P).

    Source: Liu et al. 2026 (GDPO, arXiv 2601.05242), whose means and deviations are those of a group.
    """
    apart = [scale.apply(part) for scale, part in zip(scales, parts.T, strict=True)]
    return torch.stack(apart, 1) if apart else parts


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """Scores (B,) clipped to [-limit, limit] against outliers; unchanged with a limit of 0."""
    return scores.clamp(-limit, limit) if limit else scores


def overlong_shares(response_lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """How much of the buffer before the longest response each one uses, 0 to 1: (B,) -> (B,).

    Source: Yu et al. 2025 (DAPO), eq. 13, with the opposite sign.
    """
    return (response_lengths - (longest - buffer)).clamp(min=0) / buffer


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """The k1 estimate log pi - log pi_ref of the KL divergence at each sampled token, (B, T), 0 outside the
    mask.

    Source: Schulman, "Approximating KL divergence" (2020). Unbiased; may be negative for a token.
    """
    return (logprobs - ref_logprobs) * response_mask


def aggregate_steps(logprobs: Tensor, ends: Tensor, how: str = "product") -> Tensor:
    """Log-probability that a response is right, by those of its steps: (B, T) -> (B,).

    logprobs (B, T): in nats, of each step on its last token, else 0; ends (B, T) bool: those tokens, at least
    one per response. how: `product` of the probabilities, the sum of their logarithms (Lightman et al. 2023,
    section 2.6); `min`, the worst step (Wang et al. 2024, section 3.4); `last`, the last step.
    """
    match how:
        case "product":
            return logprobs.sum(1)
        case "min":
            return logprobs.amin(1)  # the zeros elsewhere are not below a logarithm of a probability
        case "last":
            column = torch.arange(ends.shape[1], device=ends.device)
            return logprobs.gather(1, (ends * column).argmax(1, keepdim=True))[:, 0]
        case _:
            assert_never(how)


def token_rewards(
    scores: Tensor, kl: Tensor, response_lengths: Tensor, kl_coef: float, step_scores: Tensor | float = 0.0
) -> Tensor:
    """Rewards (B, T): -kl_coef * kl at every response token, plus the score (B,) at the last one.

    kl (B, T) is 0 outside the response; response_lengths (B,) are at least 1. step_scores (B, T): added at
    the last token of each step, 0 elsewhere (Wang et al. 2024 (Math-Shepherd), section 3.5).
    Source: Ziegler et al. 2019, eq. 2; Ouyang et al. 2022, eq. 2.
    """
    rewards = step_scores - kl_coef * kl
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, response_lengths - 1] += scores
    return rewards

"""Changes of the implicit rewards and of a pair's weight before a loss compares them. Pure."""

import math
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_EXPONENT = 80.0  # exp of it is finite in fp32


def f_rewards(log_ratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(t) of t = policy / reference, of the f-divergence between the two: (N,) -> (N,).

    reverse_kl        log t                           as in DPO
    forward_kl        1 - 1 / t
    js_divergence     log(2 t / (1 + t))
    alpha_divergence  (t^(alpha - 1) - 1) / (alpha - 1), from forward_kl at 0 to reverse_kl at 1

    Source: Wang et al. 2023 (f-DPO), table 1, whose alpha is 1 - alpha here; as in TRL.
    """
    match divergence:
        case "reverse_kl":
            return log_ratios
        case "forward_kl":
            return power_rewards(log_ratios, -1.0)
        case "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratios)
        case "alpha_divergence":
            return power_rewards(log_ratios, alpha - 1.0)
        case _:
            assert_never(divergence)


def power_rewards(log_values: Tensor, exponent: float) -> Tensor:
    """(v^k - 1) / k of v = exp(log_values) and k = exponent; its limit log v for k = 0: (N,) -> (N,).

    With k = -alpha and probabilities v, the reward of AlphaPO: Gupta et al. 2025.
    """
    if abs(exponent) < 1e-6:
        return log_values
    return torch.expm1((exponent * log_values).clamp(max=LARGEST_EXPONENT)) / exponent


def length_weighted_sums(logprobs: Tensor, is_response: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """Sums of log-probabilities in which tokens after the first `shared` of a response weigh alpha.

    logprobs and is_response (N, T), shared (N,) -> (N,). shared: length of the shortest response to the
    prompt. Source: Liu et al. 2024 (LD-DPO).
    """
    position = is_response.cumsum(dim=1)
    weights = torch.where(position <= shared[:, None], 1.0, alpha)
    return (logprobs * is_response * weights).sum(dim=1)


def wpo_weights(logprobs: Tensor, collision_entropy: Tensor, is_response: Tensor) -> Tensor:
    """exp of the mean over tokens of log p(token) - log sum_v p(v)^2, without gradient: (N, T) each -> (N,).

    A pair weighs the product for its two responses: more, the likelier the policy is to sample them. Source:
    Zhou et al. 2024 (WPO), eq. 2. collision_entropy: -log sum_v p(v)^2 before each token.
    """
    aligned = (logprobs.detach() + collision_entropy.detach()) * is_response
    return torch.exp(aligned.sum(dim=1) / is_response.sum(dim=1).clamp(min=1))

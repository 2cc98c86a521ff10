"""The losses of the reward model. Pure."""

import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | float = 0.0, target: Tensor | float = 1.0
) -> Tensor:
    """-t log sigmoid(d) - (1 - t) log sigmoid(-d) of each pair, where d = chosen - rejected - margin.

    Scores (B,), margin and target t (B,) or numbers -> (B,) fp32. With t = 1, the Bradley-Terry likelihood of
    the observed preference: Ouyang et al. 2022 (InstructGPT), eq. 1. Margin: Touvron et al. 2023 (Llama 2),
    eq. 2. t < 1: label smoothing, t is the probability that the label is right (as in conservative DPO:
    Mitchell 2023). t = 1/2: a tie.
    """
    difference = chosen_scores.float() - rejected_scores.float() - margin
    return -target * F.logsigmoid(difference) - (1.0 - target) * F.logsigmoid(-difference)


def harm_loss(costs: Tensor, signs: Tensor) -> Tensor:
    """-log sigmoid(s C) of each response, with the sign s = 1 for a harmful and -1 for a harmless one.

    costs, signs (B,) -> (B,) fp32. It makes 0 the border between harmless and harmful. Source: Dai et al.
    2023 (Safe RLHF), eq. 6, whose first term is `pairwise_loss` with the more harmful response as chosen.
    """
    return -F.logsigmoid(signs * costs.float())


def centring_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """(chosen + rejected)^2 of each pair, which keeps scores near 0: scores (B,) -> (B,) fp32.

    Source: Eisenstein et al. 2023, eq. 2.
    """
    return (chosen_scores.float() + rejected_scores.float()) ** 2


def language_loss(logprobs: Tensor, num_tokens: int) -> Tensor:
    """Negative log-likelihood of the best responses, as this micro-batch's share of the global token mean.

    logprobs (N,): of their tokens; num_tokens: those of the global batch. As a regulariser of reward models:
    Yang et al. 2024 ("Regularizing Hidden States"), section 3.
    """
    return -logprobs.sum() / num_tokens

"""The losses of direct preference optimisation. Pure.

`chosen` and `rejected` are the implicit rewards of a pair's responses, (P,) each, up to the factor beta: the
log-ratio of policy and reference or, without a reference, the log-probability. Sums or means over tokens:

    sum of log-ratios            dpo, robust, hinge, kto, and ipo as in its paper (--ipo_sum)
    mean of log-ratios           ipo, as in HALOs and TRL
    sum of log-probabilities     cpo
    mean of log-probabilities    simpo, orpo
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) of each pair, where d = chosen - rejected.

    (P,) fp32 -> (P,). Source: Rafailov et al. 2023, eq. 7. With e, the probability that a label is wrong,
    conservative DPO: Mitchell 2023, as in the authors' code (TRL's `sigmoid` ignores e). Applied to
    log-probabilities, the preference term of CPO: Xu et al. 2024.
    """
    difference = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(difference) - label_smoothing * F.logsigmoid(-difference)


def robust_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2e): (P,) -> (P,).

    Unbiased if a share e of the labels is wrong. Source: Chowdhury et al. 2024 ("Provably Robust DPO").
    """
    difference = beta * (chosen - rejected)
    right, wrong = F.logsigmoid(difference), F.logsigmoid(-difference)
    return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def hinge_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta d): (P,) -> (P,). Source: Liu et al. 2024 (RSO), after SLiC, Zhao et al. 2023."""
    return torch.relu(1 - beta * (chosen - rejected))


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(d - 1 / (2 beta))^2: (P,) -> (P,). Source: Azar et al. 2023, eq. 17, where beta is tau.

    The paper and the code of DPO's authors sum over tokens; HALOs and TRL take means.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0
) -> Tensor:
    """`dpo_loss` with the margin gamma / beta subtracted from d: (P,) -> (P,).

    Source: Meng et al. 2024, eq. 6. As in the authors' code, the option is this ratio; TRL's takes gamma.
    """
    return dpo_loss(chosen - gamma_beta_ratio, rejected, beta, label_smoothing)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-beta log sigmoid of the log odds ratio, with odds p / (1 - p), where log p is the mean over tokens.

    (P,) -> (P,). Source: Hong et al. 2024, eq. 6 and 7, whose lambda is beta.
    """
    log_odds = chosen - rejected - _log1mexp(chosen) + _log1mexp(rejected)
    return -beta * F.logsigmoid(log_odds)


def kto_loss(
    log_ratios: Tensor, is_desirable: Tensor, reference_point: float, beta: float,
    weights: tuple[float, float],
) -> Tensor:  # fmt: skip
    """w (1 - sigmoid(+-beta (r - z))) of each response: + for desirable ones, - for the others.

    log_ratios r and is_desirable (N,) -> (N,); reference_point z: an estimate of KL; weights w: of desirable
    and of undesirable responses. Source: Ethayarajh et al. 2024, section 4.
    """
    sign, weight = torch.where(is_desirable, 1.0, -1.0), torch.where(is_desirable, *weights)
    return weight * torch.sigmoid(-sign * beta * (log_ratios - reference_point))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, accurate near 0 and far from it; x is clamped to at most -1e-6."""
    x = x.clamp(max=-1e-6)
    near = torch.log(-torch.expm1(x))
    return torch.where(x > -0.6931, near, torch.log1p(-torch.exp(x)))

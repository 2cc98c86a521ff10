"""The losses of direct preference optimisation. Pure.

`chosen` and `rejected`, c and r, are the implicit rewards of a pair's responses, (P,) each, up to the factor
beta: the log-ratio of policy and reference or, without a reference, the log-probability. d is c - r. They are
sums or means over tokens:

    sum of log-ratios            all losses that are not named below, and ipo as in its paper (--ipo_sum)
    mean of log-ratios           ipo, as in HALOs and TRL; sigmoid_norm
    sum of log-probabilities     cpo, cpo_hinge
    mean of log-probabilities    simpo, simpo_hinge, orpo

rewards.py has what changes the rewards before they are compared: f-divergences, AlphaPO, LD-DPO, WPO.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) of each pair, where d = chosen - rejected.

    (P,) fp32 -> (P,). Source: Rafailov et al. 2023, eq. 7. With e, the probability that a label is wrong,
    conservative DPO: Mitchell 2023, as in the authors' code (TRL's `sigmoid` ignores e). Applied to
    log-probabilities, the preference term of CPO: Xu et al. 2024. Applied to means of log-ratios, the
    length-normalised DPO of Tulu 3: Lambert et al. 2024, section 5.
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


def exo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """KL of (sigmoid(beta d), sigmoid(-beta d)) from the label (1 - e, e), with e above 0: (P,) -> (P,).

    Source: Ji et al. 2024 (EXO), eq. 16.
    """
    difference = beta * (chosen - rejected)
    right, wrong = F.logsigmoid(difference), F.logsigmoid(-difference)
    return right.exp() * (right - math.log1p(-label_smoothing)) + wrong.exp() * (
        wrong - math.log(label_smoothing)
    )


def nca_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta c) - (log sigmoid(-beta c) + log sigmoid(-beta r)) / 2: (P,) -> (P,).

    It bounds the rewards c and r themselves, not only their difference. Source: Chen et al. 2024 (NCA), for
    two responses.
    """
    c, r = beta * chosen, beta * rejected
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta c) - log sigmoid(-beta r): (P,) -> (P,).

    A classifier of responses whose logit is the reward. Source: Jung et al. 2024 (BCO). The caller subtracts
    the paper's shift delta, if any, from both sides (reward_shift.py); TRL has none.
    """
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2: (P,) -> (P,).

    Source: Wu et al. 2024 (SPPO), eq. 4.7, with win probabilities of 1 and 0; 1 / beta is the paper's eta.
    """
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """1 - sigmoid(beta c) + sigmoid(beta r): (P,) -> (P,). Source: D'Oosterlinck et al. 2024 (APO), eq. 7.

    Raises chosen and lowers rejected responses: for chosen ones better than those of the model.
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """sigmoid(beta c) + 1 - sigmoid(beta d): (P,) -> (P,). Source: D'Oosterlinck et al. 2024 (APO), eq. 8.

    Lowers both, rejected responses more: for chosen ones worse than those of the model.
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def discopop_loss(chosen: Tensor, rejected: Tensor, beta: float, temperature: float) -> Tensor:
    """-(1 - m) log sigmoid(beta d) + m exp(-beta d), where m = sigmoid(beta d / temperature): (P,) -> (P,).

    Source: Lu et al. 2024 (DiscoPOP), eq. 5. The second term is the exponential of a sum of logarithms, since
    a factor alone can overflow.
    """
    difference = beta * (chosen - rejected)
    logistic = -torch.sigmoid(-difference / temperature) * F.logsigmoid(difference)
    return logistic + torch.exp(F.logsigmoid(difference / temperature) - difference)


def aot_partners(chosen: Tensor, rejected: Tensor, reference_margins: Tensor) -> Tensor:
    """Partners of chosen and rejected responses in `aot_loss`, paired: (P,) each -> (P, 2).

    The policy's margins log pi(chosen) - log pi(rejected), sorted, are compared with those of the reference,
    sorted. Source: Melnyk et al. 2024 (AOT).
    """
    margins = chosen - rejected + reference_margins
    compared_with = _matched(margins, reference_margins)
    shift = reference_margins - compared_with
    return torch.stack([rejected - shift, chosen + shift], dim=1)


def aot_unpaired_partners(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Partners of chosen and rejected responses in `aot_loss`, unpaired: (P,) each -> (P, 2).

    The rewards of chosen responses, sorted, are compared with those of rejected ones, sorted. Source: Melnyk
    et al. 2024 (AOT).
    """
    return torch.stack([_matched(chosen, rejected), _matched(rejected, chosen)], dim=1)


def aot_loss(
    chosen: Tensor, rejected: Tensor, partners: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """`dpo_loss` of each response and its partner, a constant: (P,), (P,), (P, 2) -> (P,).

    The mean over all pairs, and its gradient, are those of the loss of the sorted rewards.
    """
    of_chosen, of_rejected = partners.unbind(1)
    both = dpo_loss(chosen, of_chosen, beta, label_smoothing)
    both = both + dpo_loss(of_rejected, rejected, beta, label_smoothing)
    # Each term has the gradient of one side and the value of both: so the values count half.
    return both - 0.5 * both.detach()


def kto_loss(
    log_ratios: Tensor, is_desirable: Tensor, reference_point: float, beta: float,
    weights: tuple[float, float],
) -> Tensor:  # fmt: skip
    """w (1 - sigmoid(+-beta (r - z))) of each response: + for desirable ones, - for the others.

    log_ratios r and is_desirable (N,) -> (N,); reference_point z: an estimate of KL; weights w: of desirable
    and of undesirable responses. Source: Ethayarajh et al. 2024, section 4. With z = 0, APO-zero for single
    responses: D'Oosterlinck et al. 2024, eq. 7.
    """
    sign, weight = torch.where(is_desirable, 1.0, -1.0), torch.where(is_desirable, *weights)
    return weight * torch.sigmoid(-sign * beta * (log_ratios - reference_point))


def _matched(values: Tensor, others: Tensor) -> Tensor:
    """For each value the other one of the same rank: (P,), (P,) -> (P,)."""
    matched = torch.empty_like(others)
    matched[values.argsort(stable=True)] = others.sort().values
    return matched


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, accurate near 0 and far from it; x is clamped to at most -1e-6."""
    x = x.clamp(max=-1e-6)
    near = torch.log(-torch.expm1(x))
    return torch.where(x > -0.6931, near, torch.log1p(-torch.exp(x)))

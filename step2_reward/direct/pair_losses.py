"""The options' choice of formulas: what a loss compares, and the loss of each pair."""

from typing import assert_never

from torch import Tensor

from step2_reward.direct.loss import (
    aot_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    nca_loss,
    orpo_loss,
    robust_loss,
    simpo_loss,
    sppo_loss,
)
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.rewards import f_rewards, power_rewards


def compared_values(log_ratios: Tensor, lengths: Tensor, options: DirectOptions) -> Tensor:
    """Compute what the loss compares, (N,), from log-ratios or log-probabilities of responses, (N,) each."""
    values = f_rewards(log_ratios, options.f_divergence, options.f_divergence_alpha)
    if options.kind.is_averaged:
        values = values / lengths
    return power_rewards(values, -options.alphapo_alpha)


def pair_losses(
    chosen: Tensor, rejected: Tensor, options: DirectOptions, partners: Tensor | None = None
) -> Tensor:
    """Compute the loss of each pair, (P,), from what it compares, (P,) each; partners (P, 2): aot's."""
    beta, smoothing, margin = options.beta, options.label_smoothing, options.gamma_beta_ratio
    match options.loss:
        case "ipo":
            return ipo_loss(chosen, rejected, beta)
        case "hinge" | "cpo_hinge":
            return hinge_loss(chosen, rejected, beta)
        case "simpo_hinge":
            return hinge_loss(chosen - margin, rejected, beta)
        case "robust":
            return robust_loss(chosen, rejected, beta, smoothing)
        case "simpo":
            return simpo_loss(chosen, rejected, beta, margin, smoothing)
        case "orpo":
            return orpo_loss(chosen, rejected, beta)
        case "exo_pair":
            return exo_loss(chosen, rejected, beta, smoothing)
        case "nca_pair":
            return nca_loss(chosen, rejected, beta)
        case "bco_pair":
            return bco_loss(chosen, rejected, beta)
        case "sppo_hard":
            return sppo_loss(chosen, rejected, beta)
        case "apo_zero":
            return apo_zero_loss(chosen, rejected, beta)
        case "apo_down":
            return apo_down_loss(chosen, rejected, beta)
        case "discopop":
            return discopop_loss(chosen, rejected, beta, options.discopop_temperature)
        case "aot" | "aot_unpaired":
            assert partners is not None
            return aot_loss(chosen, rejected, partners, beta, smoothing)
        case "dpo" | "cpo" | "sigmoid_norm":
            return dpo_loss(chosen, rejected, beta, smoothing)
        case _:
            assert_never(options.loss)

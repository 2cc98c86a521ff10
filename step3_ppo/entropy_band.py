"""The weight of the entropy bonus, adapted to keep the entropy in a band. Pure.

Source: He et al. 2025 (Skywork-OR1), adaptive entropy control, with two limits in place of their one target.
"""


def bonus_weight(coef: float, entropy: float, high: float) -> float:
    """The weight of the bonus in an iteration: the coefficient, but 0 after an iteration above the band.

    The entropy follows the weight some iterations later, so that without this it rises far above the band
    before the coefficient is down again. entropy: of the last iteration, in nats per token.
    """
    return 0.0 if entropy > high else coef


def adapted_coef(coef: float, entropy: float, low: float, high: float, change: float) -> float:
    """The coefficient of the next iteration: higher by `change` if the entropy is below the band, lower if it
    is above, but not below 0.

    entropy: of the iteration, in nats per token; NaN leaves the coefficient.
    """
    if entropy < low:
        return coef + change
    return max(coef - change, 0.0) if entropy > high else coef

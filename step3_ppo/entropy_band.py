"""The coefficient of the entropy bonus, adapted to keep the entropy in a band. Pure."""


def adapted_coef(coef: float, entropy: float, low: float, high: float, change: float) -> float:
    """The coefficient of the next iteration: higher by `change` if the entropy is below the band, lower if it
    is above, but not below 0.

    entropy: of the iteration, in nats per token; NaN leaves the coefficient. Source: He et al. 2025
    (Skywork-OR1), adaptive entropy control, with two limits in place of one target above which their bonus is
    off.
    """
    if entropy < low:
        return coef + change
    return max(coef - change, 0.0) if entropy > high else coef

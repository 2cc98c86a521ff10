"""The KL penalty: coefficient, kind (in the reward or in the loss), and adaptive control."""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

from torch import Tensor

from step3_ppo.losses import kl_loss


@dataclass
class KLPenalty:
    """Coefficient and kind of the penalty; the coefficient is adaptive with a horizon, fixed with 0.

    kind: `reward` subtracts coef * k1 from the reward of each token; `k2` and `k3` add coef times that
    estimator to the loss. Typical coefficients: 0.01 to 0.1. target: KL per response, in nats, typically 6 to
    10. horizon: responses.
    """

    coef: float
    kind: Literal["reward", "k2", "k3"] = "reward"
    target: float = 6.0
    horizon: float = 0.0

    @property
    def reward_coef(self) -> float:
        """Coefficient of the KL subtracted from rewards; 0 if the penalty is in the loss."""
        match self.kind:
            case "reward":
                return self.coef
            case "k2" | "k3":
                return 0.0
            case _:
                assert_never(self.kind)

    def add_to_loss(self, loss: Tensor, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """The loss (N,) of each token, plus the penalty unless it is in the reward."""
        match self.kind:
            case "reward":
                return loss
            case "k2" | "k3":
                return loss + self.coef * kl_loss(logprobs, ref_logprobs, self.kind)
            case _:
                assert_never(self.kind)

    def update(self, kl: float, num_responses: int) -> None:
        """Adapt the coefficient after n responses: coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n /
        horizon.

        kl: summed over the response, averaged over responses. Source: Ziegler et al. 2019, section 2.2.
        """
        if self.horizon and math.isfinite(kl):
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * num_responses / self.horizon

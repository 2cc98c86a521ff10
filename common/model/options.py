"""Options of reward models."""

from dataclasses import dataclass
from typing import Literal

from common.runtime.options import option


@dataclass
class EnsembleOptions:
    """Reward models."""

    reward_model_name_or_path: list[str] = option(
        [], "The reward model: `final/` of step 2; several are an ensemble."
    )
    reward_combine: Literal["mean", "min", "mean_std"] = option(
        "mean", "The score of an ensemble: the mean, the least, or the mean less --reward_std_coef x std."
    )
    reward_std_coef: float = option(
        1.0, "How much mean_std takes off where reward models disagree.", at_least=0
    )
    reward_weights: list[float] = option(
        [], "Weights of the reward models in mean and std. Default: all alike."
    )

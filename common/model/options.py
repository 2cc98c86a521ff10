"""Options for reward models and ensembles."""

from dataclasses import dataclass
from typing import Literal

from common.runtime.options import option


@dataclass
class EnsembleOptions:
    """Reward models."""

    reward_model_name_or_path: list[str] = option(
        [], "Reward model: `final/` of step 2. Several form an ensemble.", resume="model"
    )
    reward_combine: Literal["mean", "min", "mean_std"] = option(
        "mean", "Ensemble score. mean: mean; min: lowest score; mean_std: mean minus --reward_std_coef x std."
    )
    reward_std_coef: float = option(1.0, "Coefficient of the standard deviation in mean_std.", at_least=0)
    reward_weights: list[float] = option(
        [], "Weights of the reward models in mean and std. Default: equal weights."
    )

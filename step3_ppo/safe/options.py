"""Options of PPO with a limit on the mean cost."""

from dataclasses import dataclass
from typing import Literal

from common.runtime.options import BEST_METRIC, UserError, option
from step3_ppo.options import PPOOptions


@dataclass
class SafeOptions(PPOOptions):
    """PPO of a policy against a reward model, with a limit on the mean cost of responses (Safe RLHF)."""

    output_dir: str = option(
        "output/step3_safe", "Folder for logs, checkpoints and the final models.", resume="free"
    )
    best_metric: Literal["none", "eval/gold"] = option("none", BEST_METRIC)
    cost_model_name_or_path: str = option(
        "", "Cost model: `final/` of step 2 with --objective cost.", resume="model"
    )
    cost_function: list[str] = option(
        [],
        "Cost functions of prompts, responses and records: FILE.py:NAME or FILE.py:NAME:WEIGHT; their sum"
        " counts.",
        resume="function",
    )
    cost_limit: float = option(
        0.0, "Limit on the mean cost of a response; a cost model's border between harmless and harmful is 0."
    )
    lambda_init: float = option(1.0, "Initial multiplier of the cost.", above=0)
    lambda_rate: float = option(
        0.1, "Learning rate of the multiplier: of its logarithm, per iteration.", at_least=0
    )
    lambda_min: float = option(0.01, "Smallest multiplier.", above=0)
    lambda_max: float = option(5.0, "Largest multiplier.", above=0)

    def check(self) -> None:
        """Raise UserError for options that contradict each other, or make no sense with a limit on cost."""
        super().check()
        if not (self.cost_model_name_or_path or self.cost_function):
            raise UserError("--cost_model_name_or_path or --cost_function is required")
        if not self.has_critic:
            raise UserError(
                f"--advantage_estimator {self.advantage_estimator}: rewards and costs have a critic each;"
                " allowed: gae"
            )
        if self.whiten_rewards:
            raise UserError("--whiten_rewards: scales rewards, but not costs; use --normalise_scores sum")
        if not self.lambda_min <= self.lambda_init <= self.lambda_max:
            raise UserError(
                f"--lambda_init {self.lambda_init}: must be from --lambda_min {self.lambda_min} to"
                f" --lambda_max {self.lambda_max}"
            )

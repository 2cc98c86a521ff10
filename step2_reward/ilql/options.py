"""Options of ILQL."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.runtime.option_checks import check_held_out, check_needs
from common.runtime.options import BEST_METRIC, TrainOptions, option
from common.training.options import TrackerOptions, check_trackers


@dataclass
class ILQLOptions(TrainOptions, TrackerOptions):
    """Implicit language Q-learning on scored responses, without sampling."""

    stage: ClassVar[int] = 2
    output_dir: str = option(
        "output/step2_ilql", "Folder for logs, checkpoints and the final model.", resume="free"
    )
    best_metric: Literal["none", "eval/loss", "eval/score_loss"] = option("none", BEST_METRIC)
    tau: float = option(
        0.7, "Expectile of V over Q: 0.5 is the mean, towards 1 the best token.", above=0, at_most=1
    )
    gamma: float = option(0.99, "Discount per token.", at_least=0, at_most=1)
    cql_scale: float = option(
        0.1, "Weight of the CQL term: cross-entropy of the tokens under softmax(Q).", at_least=0
    )
    awac_scale: float = option(1.0, "Weight of the cross-entropy of the policy; 0: none.", at_least=0)
    beta: float = option(
        0.0, "Cross-entropy is weighted by exp(beta x advantage); 0: alike.", at_least=0, at_most=100
    )
    alpha: float = option(
        0.001, "Part of the way that the target Q heads move to the Q heads at a time.", above=0, at_most=1
    )
    steps_for_target_q_sync: int = option(5, "Steps between moves of the target Q heads.", at_least=1)
    standardise_scores: bool = option(True, "Scale scores to mean 0 and standard deviation 1 over the data.")
    ilql_beta: float = option(
        1.0, "Weight of Q in decoding, saved in final/: log-policy + beta (min Q - V).", at_least=0
    )

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        check_held_out(self)
        check_trackers(self)
        check_needs(self, {"beta": "awac_scale"})

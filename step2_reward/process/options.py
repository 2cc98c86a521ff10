"""Options of the process reward model."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.runtime.option_checks import check_held_out
from common.runtime.options import BEST_METRIC, TrainOptions, UserError, option
from common.training.options import TrackerOptions, check_trackers


@dataclass
class ProcessRewardOptions(TrainOptions, TrackerOptions):
    """Process reward model training on labelled steps of responses."""

    stage: ClassVar[int] = 2
    output_dir: str = option(
        "output/step2_process", "Folder for logs, checkpoints and the final model.", resume="free"
    )
    learning_rate: float = option(9e-6, "Peak learning rate.", above=0)
    best_metric: Literal["none", "eval/loss", "eval/accuracy", "eval/first_error"] = option(
        "none", BEST_METRIC
    )
    step_separator: str = option(
        r"\n", r"Text that ends a step, saved with the model; \n stands for a line end."
    )

    @property
    def separator(self) -> str:
        """The separator as it is in responses."""
        return self.step_separator.replace(r"\n", "\n")

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        check_held_out(self)
        check_trackers(self)
        if not self.separator:
            raise UserError(r"--step_separator: is empty; it must be text, such as \n")

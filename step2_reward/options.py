"""Options of step 2."""

from dataclasses import dataclass
from typing import ClassVar

from common.options import TrainOptions, option


@dataclass
class RewardOptions(TrainOptions):
    """A reward model from `prompt` + `chosen` + `rejected`, or from whole dialogues."""

    stage: ClassVar[int] = 2
    output_dir: str = option("output/step2_reward", "Folder for logs, checkpoints and the final model.")
    learning_rate: float = option(9e-6, "Highest learning rate.", above=0)
    use_margin: bool = option(False, "Let the `margin` of a record enter the loss.")
    label_smoothing: float = option(
        0.0, "Probability that a rater chose the wrong response.", at_least=0, at_most=0.49
    )
    centre_coef: float = option(
        0.0, "Weight of (chosen + rejected)^2, which keeps scores around 0 while they are learnt.", at_least=0
    )
    demonstration_data: list[str] = option(
        [],
        "Demonstrations that are to score 0 on average. Default: the chosen responses of the training data.",
    )
    max_centre_samples: int = option(512, "Responses scored to find that average.", at_least=2)

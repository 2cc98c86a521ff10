"""Options of step 2."""

from dataclasses import dataclass

from common.options import TrainOptions, option


@dataclass
class RewardOptions(TrainOptions):
    """A reward model from `prompt` + `chosen` + `rejected`, or from whole dialogues."""

    output_dir: str = option("output/step2_reward", "Folder for logs, checkpoints and the final model.")
    learning_rate: float = option(9e-6, "Highest learning rate.", above=0)
    use_margin: bool = option(False, "Let the `margin` of a record enter the loss.")
    demonstration_data: list[str] = option(
        [],
        "Demonstrations that are to score 0 on average. Default: the chosen responses of the training data.",
    )
    max_centre_samples: int = option(512, "Responses scored to find that average.", at_least=2)

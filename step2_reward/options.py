"""Options of step 2."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.model.reward_ensemble import EnsembleOptions
from common.runtime.options import BEST_METRIC, CacheOptions, TrainOptions, option


@dataclass
class RewardOptions(TrainOptions):
    """A reward model from pairs of responses or whole dialogues, or from several responses with ranks."""

    stage: ClassVar[int] = 2
    output_dir: str = option("output/step2_reward", "Folder for logs, checkpoints and the final model.")
    learning_rate: float = option(9e-6, "Highest learning rate.", above=0)
    best_metric: Literal["none", "eval/loss", "eval/accuracy"] = option("none", BEST_METRIC)
    use_margin: bool = option(False, "Let the `margin` of a record enter the loss.")
    label_smoothing: float = option(
        0.0, "Probability that a rater chose the wrong response.", at_least=0, at_most=0.49
    )
    centre_coef: float = option(
        0.0, "Weight of (chosen + rejected)^2, which keeps scores around 0 while they are learnt.", at_least=0
    )
    lm_loss_coef: float = option(
        0.0,
        "Weight of the language-model loss of the best responses, under the SFT model's head.",
        at_least=0,
    )
    share_prompts: Literal["auto", "yes", "no"] = option(
        "auto",
        "Encode a prompt once for all its responses: where that is less work, always, or never. A model that"
        " cannot do so gets it with each response.",
    )
    golden_data: list[str] = option(
        [], "Preferences that the finished model is judged on: a report in golden/. Never learnt from."
    )
    demonstration_data: list[str] = option(
        [],
        "Demonstrations that are to score 0 on average. Default: the chosen responses of the training data.",
    )
    max_centre_samples: int = option(512, "Responses scored to find that average.", at_least=2)


@dataclass
class EvaluateOptions(CacheOptions, EnsembleOptions):
    """A reward model, or several as one, judged on preferences."""

    eval_data: list[str] = option([], "Preferences: files or hub names. Required.")
    max_eval_samples: int = option(0, "Use at most this many records; 0 uses all.", at_least=0)
    output_dir: str = option("output/evaluate_reward", "Folder for report.json, pictures and TensorBoard.")
    max_length: int = option(1024, "Longest record in tokens; a longer one is left out.", at_least=8)
    micro_batch_size: int = option(16, "Records that one rank puts through a model at once.", at_least=1)
    zero_config: str = option(
        "", "DeepSpeed JSON that says precision, and partitions at stage 3. Default: as in training."
    )

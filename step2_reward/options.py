"""Options of step 2."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.model.options import EnsembleOptions
from common.runtime.option_checks import check_held_out
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

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        check_held_out(self)


@dataclass
class EvaluateRewardOptions(CacheOptions, EnsembleOptions):
    """A reward model, or several as one, judged on preferences."""

    reward_model_name_or_path: list[str] = option(
        [], "The reward model: `final/` of step 2; several are an ensemble.", required=True
    )
    eval_data: list[str] = option([], "Preferences: files or hub names.", required=True)
    max_eval_samples: int = option(0, "Use at most this many records; 0 uses all.", at_least=0)
    output_dir: str = option("output/evaluate_reward", "Folder for report.json, pictures and TensorBoard.")
    max_length: int = option(1024, "Longest record in tokens; a longer one is left out.", at_least=8)
    micro_batch_size: int = option(16, "Records that one rank puts through a model at once.", at_least=1)
    zero_config: str = option(
        "", "DeepSpeed JSON that says precision, and partitions at stage 3. Default: as in training."
    )


@dataclass
class ScoreOptions(EnsembleOptions):
    """Scores of responses by one reward model or several."""

    reward_model_name_or_path: list[str] = option(
        [], "The reward model: `final/` of step 2; several are an ensemble.", required=True
    )
    input: str = option(
        "", "Records: prompt + response (or completion), or messages; F.jsonl:0.1: a tenth of them.",
        required=True,
    )  # fmt: skip
    output: str = option("", "JSONL file for the same records with `score`, in their order.", required=True)
    micro_batch_size: int = option(32, "Records scored at once.", at_least=1)
    max_length: int = option(1024, "Longest sequence in tokens; prompts lose their beginning.", at_least=8)
    bf16: bool = option(True, "Compute in bf16 where there is a GPU.")
    skip_bad_records: bool = option(False, "Leave bad records out instead of stopping at the first.")

"""Options of step 2."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.model.options import EnsembleOptions
from common.runtime.option_checks import check_held_out
from common.runtime.options import (
    ATTENTION,
    BEST_METRIC,
    MICRO_BATCH_TOKENS,
    Attention,
    CacheOptions,
    InferenceOptions,
    TrainOptions,
    UserError,
    option,
)
from common.training.options import TrackerOptions, check_trackers

NOT_FOR_COSTS = {
    "use_margin": "whose pairs have no margin",
    "centre_coef": "whose zero is the border between harmless and harmful",
    "demonstration_data": "whose zero is the border between harmless and harmful",
    "lm_loss_coef": "whose first response is the more harmful one",
}
Objective = Literal["reward", "cost"]


@dataclass
class RewardOptions(TrainOptions, TrackerOptions):
    """Reward model training on pairs of responses or dialogues, or on ranked responses."""

    stage: ClassVar[int] = 2
    output_dir: str = option(
        "output/step2_reward", "Folder for logs, checkpoints and the final model.", resume="free"
    )
    objective: Objective = option(
        "reward",
        "What to train.\nreward: a score, higher for the preferred response"
        "\ncost: a cost, higher for the more harmful response and above 0 if it is harmful\n",
    )
    learning_rate: float = option(9e-6, "Peak learning rate.", above=0)
    best_metric: Literal["none", "eval/loss", "eval/accuracy"] = option("none", BEST_METRIC)
    use_margin: bool = option(False, "Use the `margin` of each record in the loss.")
    label_smoothing: float = option(
        0.0, "Probability that a rater chose the wrong response.", at_least=0, at_most=0.49
    )
    centre_coef: float = option(
        0.0, "Weight of (chosen + rejected)^2, which keeps scores near 0 during training.", at_least=0
    )
    lm_loss_coef: float = option(
        0.0,
        "Weight of the language-model loss on the best responses, through the SFT model's output head.",
        at_least=0,
    )
    share_prompts: Literal["auto", "yes", "no"] = option(
        "auto",
        "Encode a prompt once for all its responses, if the model supports it.\nauto: where that is less work"
        "\nyes: always\nno: never\n",
        resume="free",
    )
    golden_data: list[str] = option(
        [], "Preferences for a report on the final model in golden/; not used in training.", resume="free"
    )
    demonstration_data: list[str] = option(
        [],
        "Demonstrations whose mean score becomes 0. Default: the chosen responses of the training data.",
        resume="centring",
    )
    max_centre_samples: int = option(512, "Responses scored to compute that mean.", at_least=2, resume="free")

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        check_held_out(self)
        check_trackers(self)
        for name in ("use_margin", "centre_coef", "lm_loss_coef", "demonstration_data"):
            if self.objective == "cost" and (value := getattr(self, name)):
                given = " ".join(value) if isinstance(value, list) else value
                raise UserError(f"--{name} {given}: not for --objective cost, {NOT_FOR_COSTS[name]}")


@dataclass
class EvaluateRewardOptions(CacheOptions, EnsembleOptions, InferenceOptions):
    """Evaluation of a reward model, or of an ensemble, on preferences."""

    reward_model_name_or_path: list[str] = option(
        [], "Reward model: `final/` of step 2; several form an ensemble.", required=True, resume="model"
    )
    eval_data: list[str] = option([], "Preferences: files or hub names.", required=True, resume="data")
    max_eval_samples: int = option(0, "Use at most this many records; 0 uses all.", at_least=0, resume="free")
    output_dir: str = option(
        "output/evaluate_reward", "Folder for report.json, plots and TensorBoard.", resume="free"
    )
    max_length: int = option(1024, "Maximum record length in tokens; longer records are dropped.", at_least=8)
    micro_batch_size: int = option(16, "Records per rank and forward pass.", at_least=1, resume="free")
    micro_batch_tokens: int = option(0, MICRO_BATCH_TOKENS, at_least=0, resume="free")


@dataclass
class ScoreOptions(EnsembleOptions):
    """Scoring of responses by a reward model or an ensemble."""

    reward_model_name_or_path: list[str] = option(
        [], "Reward model: `final/` of step 2; several form an ensemble.", required=True, resume="model"
    )
    input: str = option(
        "", "Records: prompt + response (or completion), or messages. F.jsonl:0.1 takes 10 %.",
        required=True,
    )  # fmt: skip
    output: str = option("", "JSONL file: the input records in order, with `score`.", required=True)
    micro_batch_size: int = option(32, "Records per forward pass.", at_least=1, resume="free")
    micro_batch_tokens: int = option(0, MICRO_BATCH_TOKENS, at_least=0, resume="free")
    max_length: int = option(
        1024, "Maximum sequence length in tokens; overlong prompts lose their beginning.", at_least=8
    )
    bf16: bool = option(True, "Compute in bf16 on a GPU.")
    attn_implementation: Attention = option("auto", ATTENTION, resume="free")
    skip_bad_records: bool = option(False, "Count and skip malformed records instead of stopping.")

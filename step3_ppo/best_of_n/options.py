"""Options of rejection sampling: what is sampled, and what is selected from that."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from common.generation.options import GenerationOptions, PromptDataOptions
from common.model.options import EnsembleOptions
from common.runtime.options import UserError, option


@dataclass
class SampleOptions(PromptDataOptions, EnsembleOptions, GenerationOptions):
    """Samples. These options decide samples.jsonl: a folder with other samples is refused."""

    stage: ClassVar[int] = 3
    resume_from_checkpoint: ClassVar[str] = "latest"  # the same command always goes on

    model_name_or_path: str = option("", "The policy: a folder or hub name.", required=True)
    prompt_data: list[str] = option(
        [], "Prompts: files or hub names, but for those that step 3 holds out.", required=True
    )
    samples_per_prompt: int = option(8, "Responses drawn to each prompt.", at_least=1)
    prompts_per_round: int = option(
        0, "Answer this many prompts, in each round the next ones in random order; 0: all.", at_least=0
    )
    round: int = option(1, "Number of the round: each draws other responses.", at_least=1)
    reward_function: list[str] = option(
        [], "FILE.py:NAME or FILE.py:NAME:WEIGHT: functions of prompts, responses, records that score too."
    )
    output_dir: str = option("output/best_of_n", "Folder for samples.jsonl, and for what is selected.")
    seed: int = option(0, "Seed of sampling, and of random pairs.", at_least=0)
    zero_config: str = option(
        "", "DeepSpeed JSON that says precision, and partitions at stage 3. Default: as in training."
    )
    timeout_minutes: float = option(
        30.0, "How long a rank waits for the slowest one before it gives up.", above=0
    )


@dataclass
class SelectOptions:
    """Selection. Samples can be selected from again with other settings, in seconds."""

    keep: Literal["best", "threshold", "quantile"] = option(
        "best", "Demonstrations: the best response to each prompt, or all that score enough."
    )
    threshold: float = option(0.0, "The least score, with --keep threshold.")
    quantile: float = option(
        0.5, "With --keep quantile, it is the one that this share of all usable responses is below.",
        at_least=0, at_most=1,
    )  # fmt: skip
    pairs: Literal["worst", "random", "none"] = option(
        "worst", "Preferences: the best response to each prompt against the worst, or any worse one."
    )
    keep_truncated: bool = option(
        False, "Select responses that --max_response_length cut, too; they are marked `ended: false`."
    )
    selection_dir: str = option(
        "", "Folder for demonstrations.jsonl, preferences.jsonl and report.json. Default: --output_dir."
    )


@dataclass
class BestOfNOptions(SampleOptions, SelectOptions):
    """Responses of a policy, the best of them as demonstrations and preferences."""

    @property
    def sampling(self) -> SampleOptions:
        return SampleOptions(**{field.name: getattr(self, field.name) for field in fields(SampleOptions)})

    @property
    def selection(self) -> SelectOptions:
        return SelectOptions(**{field.name: getattr(self, field.name) for field in fields(SelectOptions)})

    def check(self) -> None:
        """Raise UserError unless something scores, and only the --keep that is chosen has a limit."""
        if not self.reward_model_name_or_path and not self.reward_function:
            raise UserError("--reward_model_name_or_path or --reward_function is required")
        defaults = SelectOptions()
        for name in ("threshold", "quantile"):
            value = getattr(self, name)
            if value != getattr(defaults, name) and self.keep != name:
                raise UserError(f"--{name} {value:g}: means nothing to --keep {self.keep}")

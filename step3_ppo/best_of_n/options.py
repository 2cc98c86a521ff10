"""Options of rejection sampling: sampling, and selection."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from common.generation.options import GenerationOptions, GuidanceOptions, PromptDataOptions, RoundOptions
from common.model.options import EnsembleOptions
from common.runtime.option_checks import check_needs
from common.runtime.options import InferenceOptions, RankOptions, UserError, option
from step3_ppo.option_groups import ProcessOptions


@dataclass
class SampleOptions(
    PromptDataOptions, RoundOptions, EnsembleOptions, ProcessOptions, GenerationOptions, GuidanceOptions,
    InferenceOptions, RankOptions,
):  # fmt: skip
    """Sampling. These options determine samples.jsonl; a folder sampled with others is refused."""

    stage: ClassVar[int] = 3
    one_of: ClassVar[tuple[str, ...]] = (
        "reward_model_name_or_path", "reward_function", "process_model_name_or_path",
    )  # fmt: skip
    resume_from_checkpoint: ClassVar[str] = "latest"  # the same command always resumes

    model_name_or_path: str = option("", "The policy: a folder or hub name.", required=True, resume="model")
    prompt_data: list[str] = option(
        [],
        "Prompts: files or hub names. Prompts that step 3 holds out are skipped.",
        required=True,
        resume="data",
    )
    samples_per_prompt: int = option(8, "Responses sampled per prompt.", at_least=1, at_most=10_000)
    reward_function: list[str] = option(
        [],
        "Reward functions of prompts, responses and records: FILE.py:NAME or FILE.py:NAME:WEIGHT.",
        resume="function",
    )
    process_aggregation: Literal["product", "min", "last"] = option(
        "product",
        "Score of a response by its steps. product: the sum of their log-probabilities; min: the lowest one;"
        " last: that of the last step.",
    )
    output_dir: str = option("output/best_of_n", "Folder for samples.jsonl and the selection.", resume="free")
    seed: int = option(0, "Seed of sampling and of random pairs.", at_least=0)


@dataclass
class SelectOptions:
    """Selection. It takes seconds, and can be repeated with other settings."""

    keep: Literal["best", "threshold", "quantile"] = option(
        "best",
        "Demonstrations. best: the best response to each prompt; threshold: all with at least the score"
        " --threshold; quantile: all at or above --quantile.",
    )
    threshold: float = option(0.0, "Lowest score, with --keep threshold.")
    quantile: float = option(
        0.5, "Score quantile of the usable responses, used as threshold with --keep quantile.",
        at_least=0, at_most=1,
    )  # fmt: skip
    pairs: Literal["worst", "random", "none"] = option(
        "worst", "Preferences: the best response to each prompt against the worst one, or a random worse one."
    )
    keep_truncated: bool = option(
        False, "Also use responses cut by --max_response_length; they are marked `ended: false`."
    )
    selection_dir: str = option(
        "", "Folder for demonstrations.jsonl, preferences.jsonl and report.json. Default: --output_dir."
    )


@dataclass
class BestOfNOptions(SampleOptions, SelectOptions):
    """Rejection sampling: responses of a policy, the best ones as demonstrations and preferences."""

    @property
    def sampling(self) -> SampleOptions:
        return SampleOptions(**{field.name: getattr(self, field.name) for field in fields(SampleOptions)})

    @property
    def selection(self) -> SelectOptions:
        return SelectOptions(**{field.name: getattr(self, field.name) for field in fields(SelectOptions)})

    def check(self) -> None:
        """Raise UserError for a limit that the chosen --keep does not use, and for other idle options."""
        needed = "process_model_name_or_path"
        check_needs(self, {"process_weight": needed, "process_aggregation": needed})
        defaults = SelectOptions()
        for name in ("threshold", "quantile"):
            value = getattr(self, name)
            if value != getattr(defaults, name) and self.keep != name:
                raise UserError(f"--{name} {value:g}: not used with --keep {self.keep}; use --keep {name}")

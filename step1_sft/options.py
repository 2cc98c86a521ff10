"""Options of step 1."""

from dataclasses import dataclass
from typing import Literal

from common.ai_feedback.options import SHIPPED, ConstitutionOptions
from common.generation.options import GenerationOptions
from common.runtime.option_checks import check_held_out
from common.runtime.options import (
    BEST_METRIC,
    CacheOptions,
    TrainOptions,
    option,
)


@dataclass
class SampleOptions:
    """Answers shown at evaluations."""

    num_samples: int = option(4, "Answers to held-out prompts shown at each evaluation.", at_least=0)
    sample_length: int = option(64, "Longest such answer, in tokens.", at_least=1)


@dataclass
class SFTOptions(TrainOptions, SampleOptions):
    """Supervised fine-tuning on demonstrations: `prompt` + `completion`, or `messages`."""

    output_dir: str = option("output/step1_sft", "Folder for logs, checkpoints and the final model.")
    best_metric: Literal["none", "eval/loss"] = option("none", BEST_METRIC)
    loss_on: Literal["response", "prompt_and_response"] = option(
        "response", "Learn from every assistant turn only, or from all tokens."
    )
    packing: bool = option(
        False, "Fill rows of up to --max_length tokens with several examples that do not see each other."
    )

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        check_held_out(self)


@dataclass
class EvaluateOptions(CacheOptions, SampleOptions):
    """Language models compared on demonstrations."""

    model_name_or_path: list[str] = option(
        [], "Folders or hub names of the models to compare.", required=True
    )
    eval_data: list[str] = option([], "Demonstrations: files or hub names.", required=True)
    max_eval_samples: int = option(0, "Use at most this many records; 0 uses all.", at_least=0)
    max_length: int = option(
        1024, "Longest record in tokens; one that is longer for any model is left out.", at_least=8
    )
    micro_batch_size: int = option(4, "Records that one rank puts through a model at once.", at_least=1)
    zero_config: str = option(
        "", "DeepSpeed JSON that says precision, and partitions at stage 3. Default: as in training."
    )
    output: str = option("", "JSON file for figures and answers.")


@dataclass
class CritiqueOptions(ConstitutionOptions, GenerationOptions, CacheOptions):
    """Answers that a model has criticised and revised by a constitution, as demonstrations."""

    prompt_data: list[str] = option([], "Red-team or ordinary prompts: files or hub names.", required=True)
    output_dir: str = option("output/critique", "Folder for demonstrations.jsonl and report.json.")
    revision_rounds: int = option(2, "Critiques and revisions of each answer.", at_least=1)
    max_response_length: int = option(
        512, "Longest answer, critique or revision in tokens; a longer revision is not used.", at_least=1
    )
    critique_template: str = option(
        str(SHIPPED / "critique.txt"), "How to ask for a critique: text with {prompt} {response} {principle}."
    )
    revision_template: str = option(
        str(SHIPPED / "revision.txt"), "How to ask for a revision: the same places, and {critique}."
    )

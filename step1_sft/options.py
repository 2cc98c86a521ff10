"""Options of step 1."""

from dataclasses import dataclass
from typing import Literal

from common.ai_feedback.options import SHIPPED, ConstitutionOptions
from common.generation.options import GenerationOptions
from common.runtime.option_checks import check_held_out
from common.runtime.options import (
    BEST_METRIC,
    CacheOptions,
    InferenceOptions,
    TrainOptions,
    UserError,
    option,
)
from common.training.options import TrackerOptions, check_trackers


@dataclass
class SampleAnswerOptions:
    """Sample answers at evaluations."""

    num_samples: int = option(
        4, "Sample answers to held-out prompts at each evaluation.", at_least=0, resume="free"
    )
    sample_length: int = option(64, "Maximum length of a sample answer in tokens.", at_least=1, resume="free")
    gather_for_generation: bool = option(
        True,
        "At ZeRO-3, gather all weights for sample answers; turn off if they do not fit on one GPU.",
        resume="free",
    )


@dataclass
class GreedyOptions(GenerationOptions):
    """Greedy decoding: only the likeliest token can be drawn."""

    top_k: int = option(1, "", at_least=1)
    seed: int = option(0, "")


@dataclass
class SFTOptions(TrainOptions, SampleAnswerOptions, TrackerOptions):
    """Supervised fine-tuning on demonstrations: `prompt` + `completion`, or `messages`."""

    output_dir: str = option(
        "output/step1_sft", "Folder for logs, checkpoints and the final model.", resume="free"
    )
    best_metric: Literal["none", "eval/loss"] = option("none", BEST_METRIC)
    loss_on: Literal["response", "prompt_and_response"] = option(
        "response",
        "Tokens in the loss.\nresponse: those of assistant turns\nprompt_and_response: all tokens\n",
    )
    token_loss: Literal["nll", "dft"] = option(
        "nll",
        "Loss of a token.\nnll: its negative log-likelihood\ndft: dynamic fine-tuning, the same times the"
        " token's probability\n",
    )
    packing: bool = option(
        False,
        "Pack several examples into rows of up to --max_length tokens; attention stays within each.",
        resume="free",
    )

    sequence_parallel: int = option(
        1,
        "Ranks that share the rows of a micro-batch, each with a part of every row; for records that do not"
        " fit on one GPU.",
        at_least=1,
        resume="free",
    )

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        check_held_out(self)
        check_trackers(self)
        check_sequence_parallel(self)
        if self.packing and 0 < self.micro_batch_tokens < self.max_length:
            raise UserError(
                f"--micro_batch_tokens {self.micro_batch_tokens}: must be at least --max_length"
                f" {self.max_length} with --packing, which fills rows up to that"
            )


def check_sequence_parallel(options: SFTOptions) -> None:
    """Raise UserError for options that exclude rows shared by ranks."""
    count = options.sequence_parallel
    if count == 1:
        return
    if options.packing:
        raise UserError(f"--sequence_parallel {count}: not with --packing; remove one of the two")
    if options.attn_implementation not in ("auto", "sdpa"):
        raise UserError(
            f"--sequence_parallel {count}: --attn_implementation is {options.attn_implementation}; allowed:"
            " auto or sdpa"
        )


@dataclass
class EvaluateSFTOptions(CacheOptions, SampleAnswerOptions, InferenceOptions):
    """Comparison of language models on demonstrations."""

    model_name_or_path: list[str] = option(
        [], "Folders or hub names of the models to compare.", required=True, resume="model"
    )
    eval_data: list[str] = option([], "Demonstrations: files or hub names.", required=True, resume="data")
    max_eval_samples: int = option(0, "Use at most this many records; 0 uses all.", at_least=0, resume="free")
    max_length: int = option(
        1024, "Maximum record length in tokens. Records too long for any of the models are dropped.",
        at_least=8,
    )  # fmt: skip
    micro_batch_size: int = option(4, "Records per rank and forward pass.", at_least=1, resume="free")
    output: str = option("", "JSON file for metrics and sample answers.")


@dataclass
class CritiqueOptions(ConstitutionOptions, GenerationOptions, CacheOptions):
    """Demonstrations from answers that a model critiques and revises by a constitution."""

    prompt_data: list[str] = option(
        [], "Red-team or ordinary prompts: files or hub names.", required=True, resume="data"
    )
    output_dir: str = option(
        "output/critique", "Folder for demonstrations.jsonl and report.json.", resume="free"
    )
    max_prompt_length: int = option(
        256, "Maximum prompt length in tokens; the start of longer prompts is removed.", at_least=1
    )
    revision_rounds: int = option(2, "Rounds of critique and revision per answer.", at_least=1, at_most=100)
    max_response_length: int = option(
        512, "Maximum tokens of an answer, critique or revision. A truncated revision is discarded.",
        at_least=1,
    )  # fmt: skip
    critique_template: str = option(
        str(SHIPPED / "critique.txt"),
        "Critique request: a text file with {prompt} {response} {principle}.",
        resume="data",
    )
    revision_template: str = option(
        str(SHIPPED / "revision.txt"),
        "Revision request: a text file with {prompt} {response} {principle} {critique}.",
        resume="data",
    )

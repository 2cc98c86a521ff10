"""Options of the command that compares policies."""

from dataclasses import dataclass
from typing import ClassVar

from common.generation.options import GenerationOptions, PromptDataOptions
from common.model.options import EnsembleOptions
from common.runtime.options import UserError, option


@dataclass
class EvaluateOptions(PromptDataOptions, EnsembleOptions, GenerationOptions):
    """Policies compared on the same held-out prompts."""

    stage: ClassVar[int] = 3

    model_name_or_path: list[str] = option(
        [], "Folders or hub names of the policies. KL and wins are against the first.", required=True
    )
    prompt_data: list[str] = option(
        [], "Prompts, of which those are used that training on the same files holds out."
    )
    eval_data: list[str] = option([], "Prompts that are used whole, in place of --prompt_data.")
    reward_function: list[str] = option(
        [], "FILE.py:NAME or FILE.py:NAME:WEIGHT: functions that score too, each by itself."
    )
    gold_reward_model: str = option("", "A reward model that training has not seen, to judge what it led to.")
    gold_function: str = option("", "FILE.py:NAME: a function that does so.")
    demonstration_data: list[str] = option(
        [],
        "Demonstrations, of which those are used that training on the same files holds out: their perplexity"
        " tells how much a policy has forgotten.",
    )
    eval_demonstration_data: list[str] = option(
        [], "Demonstrations that are used whole, in place of --demonstration_data."
    )
    max_length: int = option(1024, "Longest demonstration in tokens; a longer one is left out.", at_least=8)
    micro_batch_size: int = option(
        4, "Demonstrations that one rank puts through a model at once.", at_least=1
    )
    best_of: int = option(
        0,
        "Responses of the first model to each prompt, for best-of-n by the first scorer; 0: none.",
        at_least=0,
    )
    output_dir: str = option("output/evaluate_ppo", "Folder for report.json and the picture.")
    seed: int = option(
        0, "Seed of sampling; the one of training gives the responses it was judged by.", at_least=0
    )
    zero_config: str = option(
        "", "DeepSpeed JSON that says precision, and partitions at stage 3. Default: as in training."
    )

    def check(self) -> None:
        """Raise UserError unless there are prompts, and something that scores."""
        if not self.prompt_data and not self.eval_data:
            raise UserError("--prompt_data or --eval_data is required")
        names = ("reward_model_name_or_path", "reward_function", "gold_reward_model", "gold_function")
        if not any(getattr(self, name) for name in names):
            raise UserError(f"one of --{' --'.join(names)} is required")

"""Options of the comparison of policies."""

from dataclasses import dataclass
from typing import ClassVar

from common.generation.options import GenerationOptions, GuidanceOptions, PromptDataOptions
from common.model.options import EnsembleOptions
from common.runtime.options import InferenceOptions, UserError, option


@dataclass
class ComparePoliciesOptions(
    PromptDataOptions, EnsembleOptions, GenerationOptions, GuidanceOptions, InferenceOptions
):
    """Compare policies on the same held-out prompts."""

    stage: ClassVar[int] = 3
    needs_support: ClassVar[bool] = True

    model_name_or_path: list[str] = option(
        [],
        "Policies: folders or hub names. KL and win rates are against the first.",
        required=True,
        resume="model",
    )
    prompt_data: list[str] = option(
        [], "Training prompts; the held-out part of these files is used.", resume="data"
    )
    eval_data: list[str] = option(
        [], "Evaluation prompts, all used, instead of --prompt_data.", resume="data"
    )
    reward_function: list[str] = option(
        [], "Reward functions, each a separate judge: FILE.py:NAME or FILE.py:NAME:WEIGHT.", resume="function"
    )
    gold_reward_model: str = option("", "Gold reward model, not used in training.", resume="model")
    gold_function: str = option("", "Gold function, not used in training: FILE.py:NAME.", resume="function")
    demonstration_data: list[str] = option(
        [],
        "Training demonstrations; perplexity on the held-out part of these files shows how much a policy has"
        " forgotten.",
        resume="data",
    )
    eval_demonstration_data: list[str] = option(
        [], "Evaluation demonstrations, all used, instead of --demonstration_data."
    )
    max_length: int = option(1024, "Longest demonstration in tokens; longer ones are dropped.", at_least=8)
    micro_batch_size: int = option(4, "Demonstrations per forward pass and rank.", at_least=1, resume="free")
    best_of: int = option(
        0,
        "Responses per prompt of the first policy, for best of n by the first judge; 0: none.",
        at_least=0,
        at_most=10_000,
    )
    output_dir: str = option("output/evaluate_ppo", "Folder for report.json and the plot.", resume="free")
    seed: int = option(
        0, "Seed of sampling; with the seed of training, responses are those of its evaluations.", at_least=0
    )

    def check(self) -> None:
        """Raise UserError without prompts or without a judge."""
        if not self.prompt_data and not self.eval_data:
            raise UserError("--prompt_data or --eval_data is required")
        names = ("reward_model_name_or_path", "reward_function", "gold_reward_model", "gold_function")
        if not any(getattr(self, name) for name in names):
            raise UserError(f"one of --{' --'.join(names)} is required")

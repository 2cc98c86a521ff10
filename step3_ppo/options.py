"""Options of step 3."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from common.generation.options import PromptDataOptions
from common.runtime.option_checks import check_held_out, check_needs, default_values, rows_per_micro_batch
from common.runtime.options import (
    BEST_METRIC,
    LoraOptions,
    OptimiserOptions,
    RunOptions,
    UserError,
    option,
    world_size,
)
from common.training.options import TrackerOptions, check_trackers
from step3_ppo.option_groups import AlgorithmOptions, KLOptions, SamplingOptions, ScoringOptions

# Options without effect, each unless the other one is set.
NEEDS = {
    "process_weight": "process_model_name_or_path", "overlong_penalty": "overlong_buffer",
    "entropy_low": "entropy_high", "entropy_coef_step": "entropy_high", "ptx_coef": "ptx_data",
    "critic_warmup_until": "critic_warmup_steps",
}  # fmt: skip


@dataclass
class PPOOptions(
    RunOptions, PromptDataOptions, OptimiserOptions, LoraOptions, ScoringOptions, SamplingOptions, KLOptions,
    AlgorithmOptions, TrackerOptions,
):  # fmt: skip
    """PPO of a policy against a reward model."""

    stage: ClassVar[int] = 3
    one_of: ClassVar[tuple[str, ...]] = (
        "reward_model_name_or_path", "reward_function", "process_model_name_or_path",
    )  # fmt: skip
    needs_support: ClassVar[bool] = True

    output_dir: str = option(
        "output/step3_ppo", "Folder for logs, checkpoints and the final models.", resume="free"
    )
    best_metric: Literal["none", "eval/score", "eval/gold"] = option("none", BEST_METRIC)
    actor_model_name_or_path: str = option(
        "", "The SFT model: `final/` of step 1.", required=True, resume="model"
    )
    actor_zero_config: str = option("", "DeepSpeed JSON of the actor. Default: --zero_config.", resume="free")
    critic_zero_config: str = option(
        "", "DeepSpeed JSON of the critic. Default: --zero_config.", resume="free"
    )
    actor_gradient_checkpointing: bool = option(
        False, "--gradient_checkpointing for the actor only.", resume="free"
    )
    critic_gradient_checkpointing: bool = option(
        False, "--gradient_checkpointing for the critic only.", resume="free"
    )
    offload_frozen: bool = option(
        False,
        "Keep reference and reward models in host memory while they do not score.",
        resume="free",
    )
    offload_states: bool = option(
        False,
        "Keep fp32 weights and AdamW's moments of actor and critic in host memory between updates; needs ZeRO"
        " stage 1 or 2.",
        resume="free",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "Learning-rate schedule."
    )
    warmup_ratio: float = option(0.0, "Share of the steps used for warmup.", at_least=0, at_most=1)
    adam_epsilon: float = option(1e-5, "AdamW epsilon.", above=0)
    early_stopping: int = option(
        0,
        "Stop after this many evaluations without a better --best_metric; 0: do not stop early.",
        at_least=0,
        resume="free",
    )
    eval_steps: int = option(
        20,
        "Iterations between evaluations on held-out prompts; 0: only before the first step and at the end.",
        at_least=0,
        resume="free",
    )
    save_steps: int = option(
        50, "Iterations between checkpoints, besides the one at the end; 0: never.", at_least=0, resume="free"
    )
    logging_steps: int = option(
        1, "Iterations between lines of metrics and progress.", at_least=1, resume="free"
    )

    @property
    def has_critic(self) -> bool:
        return self.advantage_estimator == "gae"

    @property
    def updates_per_step(self) -> int:
        """Optimiser steps of an iteration, unless --max_update_kl ends it earlier."""
        return self.ppo_epochs * self.rollout_batch_size // self.global_batch_size

    @property
    def responses_per_row(self) -> int:
        """How many responses can share a row with their prompt, so that all ranks get as many rows."""
        if self.global_batch_size % math.lcm(self.samples_per_prompt, world_size()):
            return 1
        if not self.micro_batch_tokens:
            return math.gcd(self.samples_per_prompt, rows_per_micro_batch(self))
        of_rank = math.gcd(self.samples_per_prompt, self.global_batch_size // world_size())
        room = (self.micro_batch_tokens - self.max_prompt_length) // self.max_response_length
        return max(n for n in range(1, of_rank + 1) if of_rank % n == 0 and n <= max(room, 1))

    def check(self) -> None:
        """Raise UserError for options that contradict each other, and if a rollout cannot be divided into
        groups, ranks and optimiser steps.
        """
        check_held_out(self)
        check_trackers(self)
        rows, ranks = self.rollout_batch_size, world_size()
        estimator = self.advantage_estimator
        if estimator in ("rloo", "group") and self.samples_per_prompt < 2:
            raise UserError(
                f"--samples_per_prompt {self.samples_per_prompt}: --advantage_estimator {estimator} compares"
                " responses to one prompt and needs at least 2"
            )
        if self.max_redraws and estimator not in ("rloo", "group"):
            raise UserError(
                f"--max_redraws {self.max_redraws}: --advantage_estimator {estimator} does not compare the"
                " responses to a prompt; rloo and group do"
            )
        longest = self.max_prompt_length + 2 * self.max_response_length
        if self.share_prompts == "yes" and 0 < self.micro_batch_tokens < longest:
            raise UserError(
                f"--share_prompts yes: --micro_batch_tokens {self.micro_batch_tokens} must be at least"
                f" {longest}, for a prompt of --max_prompt_length and two responses of --max_response_length"
            )
        if self.share_prompts == "yes" and self.responses_per_row == 1:
            raise UserError(
                f"--share_prompts yes: --samples_per_prompt {self.samples_per_prompt} and the size of"
                " micro-batches need a common divisor above 1, and --global_batch_size must be a multiple of"
                " --samples_per_prompt"
            )
        if self.paged_adamw and self.offload_states:
            raise UserError("--paged_adamw: --offload_states moves the same moments; remove one of them")
        check_best_metric(self)
        check_losses(self)
        check_controller(self)
        for name, divisor in {
            "--global_batch_size": self.global_batch_size,
            "--samples_per_prompt": self.samples_per_prompt,
            "ranks": ranks,
        }.items():
            if rows % divisor:
                raise UserError(f"--rollout_batch_size {rows} is not a multiple of {name} {divisor}")


def check_best_metric(options: PPOOptions) -> None:
    """Raise UserError if the best metric, or stopping by it, lacks an option."""
    if options.early_stopping and options.best_metric == "none":
        raise UserError(
            f"--early_stopping {options.early_stopping}: needs a --best_metric: eval/score or eval/gold"
        )
    if options.early_stopping and not options.eval_steps:
        raise UserError(f"--early_stopping {options.early_stopping}: needs --eval_steps; it is 0")
    if options.best_metric == "eval/gold" and not (options.gold_reward_model or options.gold_function):
        raise UserError("--best_metric eval/gold: needs --gold_reward_model or --gold_function")


def check_losses(options: PPOOptions) -> None:
    """Raise UserError if options of scores, advantages and losses exclude each other, or lack one that they
    need.
    """
    check_needs(options, NEEDS)
    of_critic = "critic_warmup_steps", "bootstrap_truncated", "critic_gae_lambda", "length_adaptive_lambda"
    for name in of_critic:
        if getattr(options, name) and not options.has_critic:
            estimator = f"--advantage_estimator {options.advantage_estimator}"
            raise UserError(f"--{name} {getattr(options, name)}: {estimator} has no critic")
    if 0 < options.dual_clip <= 1:
        raise UserError(f"--dual_clip {options.dual_clip} must be above 1, or 0 for none")
    if 0 < options.rollout_ratio_cap < 1:
        raise UserError(f"--rollout_ratio_cap {options.rollout_ratio_cap} must be at least 1, or 0 for none")
    is_own = options.dual_clip not in (0.0, default_values(options)["dual_clip"])
    if options.policy_loss == "cispo" and is_own:
        raise UserError(f"--dual_clip {options.dual_clip}: --policy_loss cispo has no dual clip")
    if options.mask_truncated and options.bootstrap_truncated:
        raise UserError(
            "--bootstrap_truncated: --mask_truncated leaves truncated responses out of the losses; remove"
            " one of the two"
        )
    if options.overlong_buffer > options.max_response_length:
        raise UserError(
            f"--overlong_buffer {options.overlong_buffer} must be at most --max_response_length"
            f" {options.max_response_length}"
        )
    if options.entropy_low and options.entropy_low >= options.entropy_high:
        raise UserError(
            f"--entropy_low {options.entropy_low} must be below --entropy_high {options.entropy_high}"
        )


def check_controller(options: PPOOptions) -> None:
    """Raise UserError unless the adaptive controller has a positive coefficient and a long enough horizon."""
    if options.kl_controller == "adaptive" and not options.kl_coef:
        raise UserError("--kl_coef 0: must be above 0 with --kl_controller adaptive, which multiplies it")
    if options.kl_controller == "adaptive" and options.kl_horizon < options.rollout_batch_size:
        raise UserError(
            f"--kl_horizon {options.kl_horizon} must be at least --rollout_batch_size"
            f" {options.rollout_batch_size}"
        )

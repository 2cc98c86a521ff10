"""Options of step 3."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.generation.options import GenerationOptions, PromptDataOptions
from common.model.options import EnsembleOptions
from common.runtime.option_checks import check_held_out
from common.runtime.options import (
    BEST_METRIC,
    LoraOptions,
    OptimiserOptions,
    RunOptions,
    UserError,
    option,
    world_size,
)


@dataclass
class SamplingOptions(GenerationOptions):
    """Prompts and rollouts."""

    prompt_data: list[str] = option([], "Prompts: files or hub names.", required=True, resume="data")
    rollout_batch_size: int = option(128, "Responses collected per iteration, over all ranks.", at_least=1)
    samples_per_prompt: int = option(1, "Responses to each prompt of an iteration.", at_least=1)
    num_samples: int = option(
        4, "Held-out answers written to TensorBoard at each evaluation.", at_least=0, resume="free"
    )


@dataclass
class RewardOptions(EnsembleOptions):
    """Scores, penalties and gold scorers."""

    reward_function: list[str] = option(
        [],
        "FILE.py:NAME or FILE.py:NAME:WEIGHT: functions of prompts, responses, records that score too.",
        resume="function",
    )
    gold_reward_model: str = option(
        "", "A reward model that judges held-out responses, and is never learnt from.", resume="model"
    )
    gold_function: str = option("", "FILE.py:NAME: a function that does so.", resume="function")
    normalise_scores: bool = option(False, "Scale scores by mean and std of all scores so far.")
    score_clip: float = option(10.0, "Clip scores to -/+ this; 0: do not.", at_least=0)
    missing_eos_penalty: float = option(
        1.0, "Taken from the score of a response that did not end.", at_least=0
    )
    length_penalty: float = option(0.0, "Taken from the score for each token of the response.", at_least=0)
    repetition_penalty: float = option(
        0.0, "Taken from the score times the share of trigrams that stood in the response before.", at_least=0
    )
    whiten_rewards: bool = option(False, "Scale the rewards of a rollout to variance 1, their mean kept.")


@dataclass
class KLOptions:
    """KL penalty and limits on updates."""

    kl_coef: float = option(0.05, "Weight of the KL penalty; the first one, if adaptive.", at_least=0)
    kl_penalty: Literal["reward", "k2", "k3"] = option(
        "reward",
        "reward: the k1 estimate, taken from the reward of each token; k2: half the squared log-ratio, a term"
        " of the loss, with the gradient of the KL divergence; k3: a term of the loss with less variance,"
        " whose gradient is not that of the KL divergence (as in GRPO).",
    )
    kl_controller: Literal["fixed", "adaptive"] = option(
        "fixed", "fixed: keep --kl_coef; adaptive: steer KL to --kl_target."
    )
    kl_target: float = option(
        6.0,
        "KL to the reference that the adaptive controller steers to, in nats per response.",
        above=0,
        formerly="target_kl",
    )
    max_update_kl: float = option(
        6.0,
        "End the epochs of an iteration when the policy is this far from that of the rollout"
        " (policy/update_kl), in nats per response.",
        above=0,
        formerly="target_kl",
    )
    kl_horizon: int = option(10_000, "Responses over which the adaptive controller acts.", at_least=1)


@dataclass
class AlgorithmOptions:
    """PPO."""

    advantage_estimator: Literal["gae", "reinforce", "rloo", "group", "reinforce_pp"] = option(
        "gae",
        "gae: by a critic (PPO); reinforce: the return less --reinforce_baseline; rloo: less the mean of the"
        " other responses to the prompt; group: less the mean of all responses to the prompt (GRPO);"
        " reinforce_pp: whitened over the rollout (REINFORCE++).",
    )
    reinforce_baseline: Literal["batch", "moving"] = option(
        "batch", "batch: the mean return of the rollout; moving: a moving average of it."
    )
    group_std: bool = option(True, "Divide by the standard deviation of the group (GRPO; without: Dr. GRPO).")
    ppo_epochs: int = option(4, "Passes over each rollout; --max_update_kl may end them earlier.", at_least=1)
    actor_learning_rate: float = option(3e-6, "Highest learning rate of the actor.", above=0)
    critic_learning_rate: float = option(9e-6, "Highest learning rate of the critic.", above=0)
    critic_warmup_steps: int = option(0, "First iterations in which only the critic learns.", at_least=0)
    clip_range: float = option(0.2, "The policy's probability ratio is clipped to 1 -/+ this.", above=0)
    value_clip_range: float = option(0.2, "The value is kept this near to its old one.", above=0)
    dual_clip: float = option(
        3.0, "Bound on the loss of a bad token, in units of its advantage; 0: none.", at_least=0
    )
    gamma: float = option(1.0, "Discount per token.", above=0, at_most=1)
    gae_lambda: float = option(0.95, "Lambda of generalised advantage estimation.", at_least=0, at_most=1)
    bootstrap_truncated: bool = option(
        False, "With gae, after a response that was cut off comes the critic's value, not 0."
    )
    whiten_advantages: bool = option(True, "Scale gae's advantages of a rollout to mean 0 and variance 1.")
    ema_decay: float = option(
        0.0,
        "Write final_ema/ with the actor's weights averaged over iterations, each time keeping this share of"
        " the average, as in 0.992; 0: do not.",
        at_least=0,
        at_most=0.999999,
    )
    entropy_coef: float = option(0.0, "Weight of the policy's entropy, a bonus in the loss.", at_least=0)
    ptx_data: list[str] = option(
        [], "Demonstrations that the actor goes on learning from: files or hub names.", resume="data"
    )
    ptx_coef: float = option(1.0, "Weight of their loss beside that of PPO.", above=0)


@dataclass
class PPOOptions(
    RunOptions, PromptDataOptions, OptimiserOptions, LoraOptions, RewardOptions, SamplingOptions, KLOptions,
    AlgorithmOptions,
):  # fmt: skip
    """PPO of a policy against a reward model."""

    stage: ClassVar[int] = 3

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
        False, "--gradient_checkpointing, of the actor alone.", resume="free"
    )
    critic_gradient_checkpointing: bool = option(
        False, "--gradient_checkpointing, of the critic alone.", resume="free"
    )
    offload_frozen: bool = option(
        False,
        "Keep reference and reward models in host memory except while each of them scores.",
        resume="free",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "Shape of the learning rates over the run."
    )
    warmup_ratio: float = option(0.0, "Part of the steps over which the rates rise.", at_least=0, at_most=1)
    adam_epsilon: float = option(1e-5, "AdamW epsilon.", above=0)
    early_stopping: int = option(
        0,
        "Stop after this many evaluations in a row without a better --best_metric; 0: do not.",
        at_least=0,
        resume="free",
    )
    eval_steps: int = option(
        20, "Evaluate on held-out prompts every so many iterations; 0: at the end.", at_least=0, resume="free"
    )
    save_steps: int = option(
        50, "Save a checkpoint every so many iterations and at the end; 0: never.", at_least=0, resume="free"
    )
    logging_steps: int = option(
        1, "Write metrics and a progress line every so many iterations.", at_least=1, resume="free"
    )

    @property
    def has_critic(self) -> bool:
        return self.advantage_estimator == "gae"

    @property
    def updates_per_step(self) -> int:
        """Optimiser steps of an iteration, unless --max_update_kl ends it earlier."""
        return self.ppo_epochs * self.rollout_batch_size // self.global_batch_size

    def check(self) -> None:
        """Raise UserError unless something scores, the estimator has all it needs, and a rollout is whole
        groups, equal shares and whole optimiser steps.
        """
        if not self.reward_model_name_or_path and not self.reward_function:
            raise UserError("--reward_model_name_or_path or --reward_function is required")
        check_held_out(self)
        rows, ranks = self.rollout_batch_size, world_size()
        estimator = self.advantage_estimator
        if estimator in ("rloo", "group") and self.samples_per_prompt < 2:
            raise UserError(
                f"--samples_per_prompt {self.samples_per_prompt}: --advantage_estimator {estimator} compares"
                " responses to one prompt and needs at least 2"
            )
        if self.early_stopping and self.best_metric == "none":
            raise UserError(
                f"--early_stopping {self.early_stopping}: needs a --best_metric: eval/score or eval/gold"
            )
        if self.early_stopping and not self.eval_steps:
            raise UserError(f"--early_stopping {self.early_stopping}: needs --eval_steps; it is 0")
        if self.best_metric == "eval/gold" and not (self.gold_reward_model or self.gold_function):
            raise UserError("--best_metric eval/gold: needs --gold_reward_model or --gold_function")
        for name in ("critic_warmup_steps", "bootstrap_truncated"):
            if getattr(self, name) and not self.has_critic:
                raise UserError(
                    f"--{name} {getattr(self, name)}: --advantage_estimator {estimator} has no critic"
                )
        if 0 < self.dual_clip <= 1:
            raise UserError(f"--dual_clip {self.dual_clip} must be above 1, or 0 for none")
        check_controller(self)
        for name, divisor in {
            "--global_batch_size": self.global_batch_size,
            "--samples_per_prompt": self.samples_per_prompt,
            "ranks": ranks,
        }.items():
            if rows % divisor:
                raise UserError(f"--rollout_batch_size {rows} is not a multiple of {name} {divisor}")


def check_controller(options: PPOOptions) -> None:
    """Raise UserError unless the adaptive controller has a coefficient, whose sign it cannot change."""
    if options.kl_controller == "adaptive" and not options.kl_coef:
        raise UserError("--kl_coef 0: --kl_controller adaptive multiplies it, and needs one above 0")
    if options.kl_controller == "adaptive" and options.kl_horizon < options.rollout_batch_size:
        raise UserError(
            f"--kl_horizon {options.kl_horizon} must be at least --rollout_batch_size"
            f" {options.rollout_batch_size}, which the controller sees at once"
        )

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
    rollout_batch_size: int = option(
        128, "Responses per iteration, over all ranks.", at_least=1, at_most=10**6
    )
    samples_per_prompt: int = option(1, "Responses per prompt in an iteration.", at_least=1)
    num_samples: int = option(
        4,
        "Held-out responses written to samples.jsonl and TensorBoard per evaluation.",
        at_least=0,
        resume="free",
    )


@dataclass
class ScoringOptions(EnsembleOptions):
    """Scores, penalties and gold scorers."""

    reward_function: list[str] = option(
        [],
        "Reward functions of prompts, responses and records: FILE.py:NAME or FILE.py:NAME:WEIGHT.",
        resume="function",
    )
    gold_reward_model: str = option(
        "", "Gold reward model for held-out responses, for evaluation only.", resume="model"
    )
    gold_function: str = option("", "Gold function, for evaluation only: FILE.py:NAME.", resume="function")
    normalise_scores: bool = option(False, "Normalise scores by the running mean and std of all scores.")
    score_clip: float = option(10.0, "Clip scores to -/+ this; 0: do not clip.", at_least=0)
    missing_eos_penalty: float = option(
        1.0, "Subtracted from the score of a response without EOS.", at_least=0
    )
    length_penalty: float = option(0.0, "Subtracted from the score per response token.", at_least=0)
    repetition_penalty: float = option(
        0.0, "Subtracted from the score, times the share of repeated trigrams in the response.", at_least=0
    )
    whiten_rewards: bool = option(False, "Scale the rewards of a rollout to variance 1; keep the mean.")


@dataclass
class KLOptions:
    """KL penalty and limits on updates."""

    kl_coef: float = option(
        0.05, "Coefficient of the KL penalty; with adaptive, its initial value.", at_least=0
    )
    kl_penalty: Literal["reward", "k2", "k3"] = option(
        "reward",
        "reward: subtract KL (k1) from the reward of each token; k2, k3: add that estimator to the loss."
        " k2 has the gradient of the KL divergence; k3 has less variance, but another gradient (GRPO).",
    )
    kl_controller: Literal["fixed", "adaptive"] = option(
        "fixed", "fixed: constant --kl_coef; adaptive: adjust it to keep KL near --kl_target."
    )
    kl_target: float = option(
        6.0,
        "Target of the adaptive controller: KL to the reference in nats per response.",
        above=0,
        formerly="target_kl",
    )
    max_update_kl: float = option(
        6.0,
        "End the epochs of an iteration when policy/update_kl, the KL to the rollout policy, exceeds this; in"
        " nats per response.",
        above=0,
        formerly="target_kl",
    )
    kl_horizon: int = option(10_000, "Horizon of the adaptive controller, in responses.", at_least=1)


@dataclass
class AlgorithmOptions:
    """PPO."""

    advantage_estimator: Literal["gae", "reinforce", "rloo", "group", "reinforce_pp"] = option(
        "gae",
        "gae: GAE with a critic (PPO); reinforce: return minus --reinforce_baseline; rloo: reward minus the"
        " mean of the other responses to the prompt; group: reward minus the mean of all responses to the"
        " prompt (GRPO); reinforce_pp: return, whitened over the rollout (REINFORCE++).",
    )
    reinforce_baseline: Literal["batch", "moving"] = option(
        "batch", "batch: mean return of the rollout; moving: its moving average."
    )
    group_std: bool = option(
        True, "With group, divide by the standard deviation of the group (GRPO); false: Dr. GRPO."
    )
    ppo_epochs: int = option(
        4, "Epochs per rollout; --max_update_kl may end them earlier.", at_least=1, at_most=1000
    )
    actor_learning_rate: float = option(3e-6, "Peak learning rate of the actor.", above=0)
    critic_learning_rate: float = option(9e-6, "Peak learning rate of the critic.", above=0)
    critic_warmup_steps: int = option(0, "First iterations, in which only the critic is trained.", at_least=0)
    clip_range: float = option(0.2, "Clip the probability ratio to 1 -/+ this.", above=0)
    value_clip_range: float = option(0.2, "Clip the value to its old value -/+ this.", above=0)
    dual_clip: float = option(
        3.0, "Cap on the loss of a token with negative advantage A: this times -A; 0: no cap.",
        at_least=0,
    )  # fmt: skip
    gamma: float = option(1.0, "Discount per token.", above=0, at_most=1)
    gae_lambda: float = option(0.95, "Lambda of generalised advantage estimation.", at_least=0, at_most=1)
    bootstrap_truncated: bool = option(
        False, "With gae, bootstrap truncated responses with the critic's value instead of 0."
    )
    whiten_advantages: bool = option(True, "With gae, whiten the advantages of a rollout.")
    ema_decay: float = option(
        0.0,
        "Decay per iteration of the actor's EMA weights, written to final_ema/; typical: 0.992. 0: no EMA.",
        at_least=0,
        at_most=0.999999,
    )
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.", at_least=0)
    ptx_data: list[str] = option([], "PPO-ptx: demonstrations, as files or hub names.", resume="data")
    ptx_coef: float = option(1.0, "PPO-ptx: weight of the loss on demonstrations.", above=0)


@dataclass
class PPOOptions(
    RunOptions, PromptDataOptions, OptimiserOptions, LoraOptions, ScoringOptions, SamplingOptions, KLOptions,
    AlgorithmOptions,
):  # fmt: skip
    """PPO of a policy against a reward model."""

    stage: ClassVar[int] = 3
    one_of: ClassVar[tuple[str, ...]] = ("reward_model_name_or_path", "reward_function")
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

    def check(self) -> None:
        """Raise UserError if the estimator lacks an option, and if a rollout cannot be
        divided into groups, ranks and optimiser steps.
        """
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
    """Raise UserError unless the adaptive controller has a positive coefficient and a long enough horizon."""
    if options.kl_controller == "adaptive" and not options.kl_coef:
        raise UserError("--kl_coef 0: must be above 0 with --kl_controller adaptive, which multiplies it")
    if options.kl_controller == "adaptive" and options.kl_horizon < options.rollout_batch_size:
        raise UserError(
            f"--kl_horizon {options.kl_horizon} must be at least --rollout_batch_size"
            f" {options.rollout_batch_size}"
        )

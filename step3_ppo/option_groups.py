"""Groups of options of step 3."""

from dataclasses import dataclass
from typing import Literal

from common.generation.options import GenerationOptions
from common.model.options import EnsembleOptions
from common.runtime.options import option


@dataclass
class SamplingOptions(GenerationOptions):
    """Prompts and rollouts."""

    prompt_data: list[str] = option([], "Prompts: files or hub names.", required=True, resume="data")
    rollout_batch_size: int = option(
        128, "Responses per iteration, over all ranks.", at_least=1, at_most=10**6
    )
    samples_per_prompt: int = option(1, "Responses per prompt in an iteration.", at_least=1)
    share_prompts: Literal["auto", "yes", "no"] = option(
        "auto",
        "Encode a prompt once for several of its responses in scoring and updates; auto: where that is less"
        " work.",
        resume="free",
    )
    max_redraws: int = option(
        0,
        "Replace groups of responses with equal scores by groups of other prompts, in at most this many"
        " attempts per iteration (dynamic sampling); 0: do not.",
        at_least=0,
        at_most=100,
    )
    num_samples: int = option(
        4,
        "Held-out responses written to samples.jsonl and TensorBoard per evaluation.",
        at_least=0,
        resume="free",
    )


@dataclass
class ProcessOptions:
    """Process reward model."""

    process_model_name_or_path: str = option(
        "",
        "Process reward model: `final/` of step2_process.sh. It scores each step of a response by the"
        " log-probability that the step is right.",
        resume="model",
    )
    process_weight: float = option(
        1.0, "Weight of the scores of steps beside the score of the whole response.", above=0
    )


@dataclass
class ScoringOptions(EnsembleOptions, ProcessOptions):
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
    normalise_scores: Literal["off", "sum", "each"] = option(
        "off",
        "Normalise by the running mean and std of all scores. sum: the weighted sum of reward models and"
        " functions; each: every reward model and function by its own mean and std, before its weight.",
        switch=("off", "sum"),
    )
    score_clip: float = option(10.0, "Clip scores to -/+ this; 0: do not clip.", at_least=0)
    missing_eos_penalty: float = option(
        1.0, "Subtracted from the score of a response without EOS.", at_least=0
    )
    length_penalty: float = option(0.0, "Subtracted from the score per response token.", at_least=0)
    repetition_penalty: float = option(
        0.0, "Subtracted from the score, times the share of repeated trigrams in the response.", at_least=0
    )
    overlong_buffer: int = option(
        0,
        "Penalise the last this many tokens before --max_response_length, by --overlong_penalty; 0: do not.",
        at_least=0,
    )
    overlong_penalty: float = option(
        1.0,
        "Subtracted from the score of a response of --max_response_length, and less of it linearly within"
        " --overlong_buffer.",
        above=0,
    )
    mask_truncated: bool = option(False, "Leave responses without EOS out of the losses of actor and critic.")
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
        "End the epochs of an iteration after a minibatch whose KL to the rollout policy is above this; in"
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
    critic_warmup_until: float = option(
        0.0,
        "End the critic's warmup before --critic_warmup_steps, once value/explained_var is at least this; 0:"
        " do not. The actor's schedule then counts the iterations of the warmup too.",
        at_least=0,
        at_most=1,
    )
    policy_loss: Literal["ppo", "gspo", "cispo"] = option(
        "ppo",
        "ppo: clipped surrogate, with a ratio per token; gspo: with a ratio per response; cispo: gradient of"
        " every token's log-probability, weighted by the clipped ratio.",
    )
    clip_range: float = option(0.2, "Clip the probability ratio to 1 -/+ this.", above=0)
    clip_range_high: float = option(
        0.0, "Clip the probability ratio above at 1 + this (clip-higher); 0: --clip_range.", at_least=0
    )
    loss_aggregation: Literal["token", "sequence", "constant"] = option(
        "token",
        "The actor's loss is a mean over all tokens (token), over the means of responses (sequence), or over"
        " their sums, divided by --max_response_length (constant: Dr. GRPO).",
    )
    rollout_ratio_cap: float = option(
        2.0,
        "Weight each token by the ratio of its probabilities under trainer and sampler, at most this; 0: do"
        " not. In fp32 without vLLM the ratio is 1.",
        at_least=0,
    )
    max_rollout_gap: float = option(
        0.0,
        "End the run when log-probabilities of sampler and trainer differ by more than this mean, in nats per"
        " token; 0: 0.1 in 16 bits, 0.001 in fp32.",
        at_least=0,
        resume="free",
    )
    value_clip_range: float = option(0.2, "Clip the value to its old value -/+ this.", above=0)
    dual_clip: float = option(
        3.0, "Cap on the loss of a token with negative advantage A: this times -A; 0: no cap. Not of cispo.",
        at_least=0,
    )  # fmt: skip
    gamma: float = option(1.0, "Discount per token.", above=0, at_most=1)
    gae_lambda: float = option(0.95, "Lambda of generalised advantage estimation.", at_least=0, at_most=1)
    critic_gae_lambda: float = option(
        0.0, "Lambda of the critic's returns alone; 0: --gae_lambda.", at_least=0, at_most=1
    )
    length_adaptive_lambda: float = option(
        0.0,
        "Lambda of the actor by length, 1 - 1 / (this * tokens), instead of --gae_lambda; 0: do not.",
        at_least=0,
    )
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
    entropy_coef: float = option(
        0.0, "Weight of the entropy bonus; with --entropy_high, its initial value.", at_least=0
    )
    entropy_low: float = option(
        0.0,
        "Raise the weight of the entropy bonus while policy/entropy is below this; needs --entropy_high.",
        at_least=0,
    )
    entropy_high: float = option(
        0.0,
        "While policy/entropy is above this, no entropy bonus, and a lower weight for later; 0: no band.",
        at_least=0,
    )
    entropy_coef_step: float = option(
        0.001, "Change of the weight per iteration, by --entropy_low and --entropy_high.", above=0
    )
    ptx_data: list[str] = option([], "PPO-ptx: demonstrations, as files or hub names.", resume="data")
    ptx_coef: float = option(1.0, "PPO-ptx: weight of the loss on demonstrations.", above=0)

"""What an update learns from: rewards, advantages and returns of a scored rollout, as the options say."""

from dataclasses import asdict, fields
from typing import assert_never

from torch import Tensor

from common.numeric.tensor_ops import masked_whiten
from common.training.means import Mean
from step3_ppo.advantages import (
    discounted_sums,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    reinforce_advantages,
    whitened_returns,
)
from step3_ppo.options import PPOOptions
from step3_ppo.rewards import KLController, RunningScale, clip_scores, repeated_share, token_kl, token_rewards
from step3_ppo.rollout import Rollout

MOVING = 0.9  # how much of a moving baseline each iteration keeps


def shape_rewards(
    rollout: Rollout, options: PPOOptions, controllers: dict[str, float]
) -> tuple[Tensor, dict[str, Mean]]:
    """Rewards (B, R): the KL penalty at every token, unless it is a loss; at the last one also the score and
    its penalties. And figures of what became of the scores, averaged over responses: `reward/clipped`, the
    share that was; `reward/penalty`, what was taken from them for EOS, length and repetition; `reward/total`,
    the sum of all rewards before they are whitened, which is what the policy is to raise.

    controllers: the KL coefficient, and what is known of earlier scores, which those of the rollout join.
    """
    scores = rollout.scores
    if options.normalise_scores:
        scale = RunningScale(*(controllers.get(f"score_{field.name}", 0.0) for field in fields(RunningScale)))
        scale.update(scores)
        scores = scale.apply(scores)
        controllers |= {f"score_{name}": value for name, value in asdict(scale).items()}
    clipped = clip_scores(scores, options.score_clip)
    penalties = (
        options.missing_eos_penalty * ~rollout.ended + options.length_penalty * rollout.response_lengths
    )
    if options.repetition_penalty:
        repeated = [repeated_share(rollout.response(row)) for row in range(len(scores))]
        penalties = penalties + options.repetition_penalty * scores.new_tensor(repeated)
    kl = token_kl(rollout.logprobs, rollout.ref_logprobs, rollout.response_mask)
    in_reward = _coefficient_in_reward(options, controllers["kl_coef"])
    rewards = token_rewards(clipped - penalties, kl, rollout.response_lengths, in_reward)
    figures = {
        "reward/clipped": Mean((clipped != scores).float().mean().item()),
        "reward/penalty": Mean(penalties.float().mean().item()),
        "reward/total": Mean(rewards.sum(1).mean().item()),
    }
    if options.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.response_mask, shift_mean=False)
    return rewards, figures


def estimate_advantages(
    rollout: Rollout, rewards: Tensor, options: PPOOptions, controllers: dict[str, float]
) -> tuple[Tensor, Tensor | None]:
    """Advantages (B, R) by --advantage_estimator, and returns (B, R) for the critic, if there is one.

    controllers: where the moving baseline of reinforce is kept.
    """
    mask, gamma, totals = rollout.response_mask, options.gamma, rewards.sum(1)
    match options.advantage_estimator:
        case "gae":
            advantages, returns = generalised_advantages(
                rewards, rollout.values, mask, gamma, options.gae_lambda, rollout.last_values
            )
            return (masked_whiten(advantages, mask) if options.whiten_advantages else advantages), returns
        case "reinforce_pp":
            return whitened_returns(rewards, mask, gamma), None
        case "reinforce":
            baseline = _baseline(discounted_sums(rewards, gamma)[:, 0].mean().item(), options, controllers)
            return reinforce_advantages(rewards, mask, gamma, baseline), None
        case "rloo":
            return leave_one_out_advantages(totals, options.samples_per_prompt)[:, None] * mask, None
        case "group":
            scaled = group_advantages(totals, options.samples_per_prompt, options.group_std)  # (B,)
            return scaled[:, None] * mask, None
        case _:
            assert_never(options.advantage_estimator)


def kl_controller(options: PPOOptions, controllers: dict[str, float]) -> KLController:
    """What sets the coefficient of the KL penalty, from where `controllers` left it."""
    coef = controllers.setdefault("kl_coef", options.kl_coef)
    match options.kl_controller:
        case "fixed":
            return KLController(coef)
        case "adaptive":
            return KLController(coef, options.target_kl, options.kl_horizon)
        case _:
            assert_never(options.kl_controller)


def _coefficient_in_reward(options: PPOOptions, kl_coef: float) -> float:
    match options.kl_penalty:
        case "reward":
            return kl_coef
        case "k2" | "k3":
            return 0.0  # a term of the loss
        case _:
            assert_never(options.kl_penalty)


def _baseline(mean: float, options: PPOOptions, controllers: dict[str, float]) -> float:
    """What reinforce compares with; mean: the mean return of the rollout."""
    match options.reinforce_baseline:
        case "batch":
            return mean
        case "moving":
            baseline = controllers.get("baseline", mean)
            controllers["baseline"] = MOVING * baseline + (1 - MOVING) * mean
            return baseline
        case _:
            assert_never(options.reinforce_baseline)

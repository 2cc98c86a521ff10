"""What an update learns from: rewards, advantages and returns of a scored rollout, as the options say."""

from dataclasses import asdict, fields

from torch import Tensor

from common.means import Mean
from common.tensor_ops import masked_whiten
from step3_ppo.advantages import (
    discounted_sums,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    reinforce_advantages,
    whitened_returns,
)
from step3_ppo.options import PPOOptions
from step3_ppo.rewards import RunningScale, clip_scores, repeated_share, token_kl, token_rewards
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
    in_reward = controllers["kl_coef"] if options.kl_penalty == "reward" else 0.0
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
    if options.advantage_estimator == "gae":
        advantages, returns = generalised_advantages(
            rewards, rollout.values, mask, gamma, options.gae_lambda, rollout.last_values
        )
        return (masked_whiten(advantages, mask) if options.whiten_advantages else advantages), returns
    if options.advantage_estimator == "reinforce_pp":
        return whitened_returns(rewards, mask, gamma), None
    if options.advantage_estimator == "reinforce":
        mean = baseline = discounted_sums(rewards, gamma)[:, 0].mean().item()
        if options.reinforce_baseline == "moving":
            baseline = controllers.get("baseline", mean)
            controllers["baseline"] = MOVING * baseline + (1 - MOVING) * mean
        return reinforce_advantages(rewards, mask, gamma, baseline), None
    if options.advantage_estimator == "rloo":
        of_responses = leave_one_out_advantages(totals, options.samples_per_prompt)  # (B,)
    else:
        of_responses = group_advantages(totals, options.samples_per_prompt, options.group_std)  # (B,)
    return of_responses[:, None] * mask, None

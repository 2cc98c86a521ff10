"""Rewards, advantages and returns of a scored rollout, according to the options."""

from typing import assert_never

from torch import Tensor

from common.numeric.tensor_ops import masked_whiten
from common.training.means import Mean
from step3_ppo.advantages import (
    discounted_sums,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    length_adaptive_lambda,
    reinforce_advantages,
    whitened_returns,
)
from step3_ppo.models import Scorer
from step3_ppo.objectives import normalised_scores
from step3_ppo.options import PPOOptions
from step3_ppo.rewards import clip_scores, overlong_shares, repeated_share, token_kl, token_rewards
from step3_ppo.rollout import Rollout
from step3_ppo.state import PPOState

MOVING = 0.9  # decay of the moving baseline per iteration


def shape_rewards(
    rollout: Rollout, scorer: Scorer, options: PPOOptions, state: PPOState
) -> tuple[Tensor, dict[str, Mean]]:
    """Rewards (B, R): the KL penalty at every token, unless it is in the loss; at the last token also the
    score less its penalties; at the last token of a step also the score of the step.

    Also metrics, averaged over responses: `reward/clipped`, the share of clipped scores; `reward/penalty`,
    the penalties for a missing EOS, length, an overlong response and repetition; `reward/total`, the sum of
    rewards before they are whitened, which the policy maximises. The scores of the rollout join the scales
    in the state.
    """
    scores = normalised_scores(rollout, scorer, options, state)
    clipped = clip_scores(scores, options.score_clip)
    penalties = (
        options.missing_eos_penalty * ~rollout.ended + options.length_penalty * rollout.response_lengths
    )
    if options.overlong_buffer:
        shares = overlong_shares(
            rollout.response_lengths, options.max_response_length, options.overlong_buffer
        )
        penalties = penalties + options.overlong_penalty * shares
    if options.repetition_penalty:
        repeated = [repeated_share(rollout.response(row)) for row in range(len(scores))]
        penalties = penalties + options.repetition_penalty * scores.new_tensor(repeated)
    kl = token_kl(rollout.logprobs, rollout.ref_logprobs, rollout.response_mask)
    steps = clip_scores(rollout.step_scores, options.score_clip)
    rewards = token_rewards(clipped - penalties, kl, rollout.response_lengths, state.kl.reward_coef, steps)
    figures = {
        "reward/clipped": Mean((clipped != scores).float().mean().item()),
        "reward/penalty": Mean(penalties.float().mean().item()),
        "reward/total": Mean(rewards.sum(1).mean().item()),
    }
    if options.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.response_mask, shift_mean=False)
    return rewards, figures


def estimate_advantages(
    rollout: Rollout, rewards: Tensor, options: PPOOptions, state: PPOState
) -> tuple[Tensor, Tensor | None]:
    """Advantages (B, R) by --advantage_estimator, and returns (B, R) for the critic, if there is one.

    The moving baseline of reinforce is in the state.
    """
    mask, gamma, totals = rollout.response_mask, options.gamma, rewards.sum(1)
    match options.advantage_estimator:
        case "gae":
            advantages, returns = generalised(rollout, rewards, options)
            return (masked_whiten(advantages, mask) if options.whiten_advantages else advantages), returns
        case "reinforce_pp":
            return whitened_returns(rewards, mask, gamma), None
        case "reinforce":
            baseline = _baseline(discounted_sums(rewards, gamma)[:, 0].double().mean().item(), options, state)
            return reinforce_advantages(rewards, mask, gamma, baseline), None
        case "rloo":
            return leave_one_out_advantages(totals, options.samples_per_prompt)[:, None] * mask, None
        case "group":
            scaled = group_advantages(totals, options.samples_per_prompt, options.group_std)  # (B,)
            return scaled[:, None] * mask, None
        case _:
            assert_never(options.advantage_estimator)


def generalised(rollout: Rollout, rewards: Tensor, options: PPOOptions) -> tuple[Tensor, Tensor]:
    """Advantages of the actor and returns of the critic, each (B, R), by the lambda of each."""

    def with_lambda(gae_lambda: float | Tensor) -> tuple[Tensor, Tensor]:
        return generalised_advantages(
            rewards, rollout.values, rollout.response_mask, options.gamma, gae_lambda, rollout.last_values
        )

    alpha = options.length_adaptive_lambda
    of_actor = length_adaptive_lambda(rollout.response_lengths, alpha) if alpha else options.gae_lambda
    advantages, returns = with_lambda(of_actor)
    if alpha or options.critic_gae_lambda:
        _, returns = with_lambda(options.critic_gae_lambda or options.gae_lambda)
    return advantages, returns


def _baseline(mean: float, options: PPOOptions, state: PPOState) -> float:
    """The baseline of reinforce. mean: the mean return of the rollout."""
    match options.reinforce_baseline:
        case "batch":
            return mean
        case "moving":
            baseline = mean if state.baseline is None else state.baseline
            state.baseline = MOVING * baseline + (1 - MOVING) * mean
            return baseline
        case _:
            assert_never(options.reinforce_baseline)

"""The update of PPO: several epochs of minibatches over one rollout."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from common.data.batching import micro_batch
from common.model.engine import backward_and_step
from common.model.engine_protocol import Engine
from common.model.forward import token_scores
from common.runtime.distributed import sum_over_ranks
from common.runtime.options import world_size
from common.training.expert_use import ExpertUse
from common.training.means import Mean
from step3_ppo.gap import SamplerGap, is_rescored, largest_gap
from step3_ppo.kl_penalty import KLPenalty
from step3_ppo.losses import (
    PolicyLoss,
    clipped_weight_loss,
    policy_loss,
    rollout_weights,
    token_weights,
    value_loss,
)
from step3_ppo.models import Models
from step3_ppo.options import PPOOptions
from step3_ppo.ptx import PretrainingMix
from step3_ppo.rollout import Rollout, Rows, minibatches, policy_pass
from step3_ppo.update_stats import Sums, UpdateStats, squared_change


class MicroBatch(NamedTuple):
    """A part of a minibatch: rows, and values of the rollout at their N response tokens, row by row."""

    rows: Rows
    numbers: list[int]  # of the rows in the rollout
    lengths: list[int]  # of the responses
    logprobs: Tensor  # (N,)
    ref_logprobs: Tensor  # (N,)
    advantages: Tensor  # (N,)
    values: Tensor | None  # (N,) None without a critic
    returns: Tensor | None  # (N,) None without a critic
    policy_weights: Tensor  # (N,) of tokens in the actor's loss
    value_weights: Tensor  # (N,) of tokens in the critic's loss
    tokens: int  # response tokens of the minibatch, over all ranks
    is_last: bool  # the last micro-batch of this rank in the minibatch


def optimise(
    models: Models, rollout: Rollout, advantages: Tensor, returns: Tensor | None,
    options: PPOOptions, kl: KLPenalty, pretraining: PretrainingMix | None, step: int,
) -> dict[str, Mean | float]:  # fmt: skip
    """Update actor and critic on every minibatch of every epoch. advantages, returns: (B, R).

    Epochs end early when the KL to the rollout policy exceeds --max_update_kl; the learning rates then follow
    their schedules as if all updates had been made.

    Every loss is a weighted mean over the tokens of the minibatch, by --loss_aggregation and
    --mask_truncated, independent of its split over ranks and micro-batches. Returns means over the tokens of
    all updates, mean gradient norms, and the number of updates skipped because of non-finite numbers.
    `policy/ratio` is that of the first minibatch, where it is 1 by construction. Raises SamplerError before
    the first update when sampler and trainer disagree.

    `policy/update_kl` is the KL from the rollout policy after the last update (k2), in nats per response,
    measured with one more forward pass of a quarter of a minibatch. Before that, the forward pass of each
    minibatch measures the updates so far; beyond --max_update_kl, the epochs end after its own update.
    """
    models.actor.train()
    if models.critic:
        models.critic.train()
    stats = UpdateStats()
    updates = 0
    size, actor_learns = options.global_batch_size, step > options.critic_warmup_steps
    rows, group = len(rollout.scores), options.samples_per_prompt
    batches = [*minibatches(rows, size, options.ppo_epochs, options.seed, step, group)]
    gap = SamplerGap(rollout, batches[0], is_rescored(models), largest_gap(models, options))
    weights = rollout_weights(rollout.logprobs, rollout.behaviour_logprobs, options.rollout_ratio_cap)
    weighted = advantages * weights  # the surrogate is proportional to the advantage
    actor, critic = models.actor if actor_learns else None, models.critic
    for batch in batches:
        if pretraining and actor_learns:
            stats.ptx_losses.append(pretraining.add_gradients(models.actor))
        micros = [*_micro_batches(rollout, batch, weighted, returns, options)]
        of_actor = ExpertUse(actor, lambda micro: policy_pass(actor, micro.rows, options.temperature), micros)
        of_critic = ExpertUse(critic, partial(_values, critic), micros)
        for micro in micros:
            if actor:
                norm = _update_actor(actor, micro, options, kl, stats.sums, gap, of_actor)
                stats.norms["policy/grad_norm"] += [norm] * micro.is_last
            if critic:
                norm = _update_critic(critic, micro, options, stats.sums, "value", of_critic)
                stats.norms["value/grad_norm"] += [norm] * micro.is_last
            stats.sums["tokens"] += len(micro.rows.labels)
        stats.add_experts(of_actor.metrics())
        updates += 1
        if stats.end_update() / len(batch) > options.max_update_kl:
            break
    update_kl = _distance(models.actor, rollout, options) if actor_learns else 0.0
    _follow_schedules(models, options, updates, actor_learns)
    of_step = {"policy/update_kl": update_kl, "policy/updates": updates} | gap.metrics
    return stats.metrics() | {name: Mean(value) for name, value in of_step.items()}


def optimise_critic(
    critic: Engine, rollout: Rollout, returns: Tensor, options: PPOOptions, step: int, updates: int, name: str
) -> dict[str, Mean | float]:
    """Update another critic, on the minibatches of the first `updates` of `optimise`. returns: (B, R).

    name: of its metrics. Its learning rate then follows the schedule as if all updates had been made.
    """
    critic.train()
    stats, no_advantages = UpdateStats(), torch.zeros_like(returns)
    rows, size, group = len(rollout.scores), options.global_batch_size, options.samples_per_prompt
    batches = minibatches(rows, size, options.ppo_epochs, options.seed, step, group)
    for batch in islice(batches, updates):
        micros = [*_micro_batches(rollout, batch, no_advantages, returns, options)]
        experts = ExpertUse(critic, partial(_values, critic), micros)
        for micro in micros:
            norm = _update_critic(critic, micro, options, stats.sums, name, experts)
            stats.norms[f"{name}/grad_norm"] += [norm] * micro.is_last
            stats.sums["tokens"] += len(micro.rows.labels)
        stats.end_update()
    for _ in range(options.updates_per_step - updates):
        critic.lr_scheduler.step()
    return stats.metrics()


def _follow_schedules(models: Models, options: PPOOptions, updates: int, actor_learns: bool) -> None:
    """Move the learning rates on as if all updates of the step had been made."""
    left_out = options.updates_per_step - updates
    steps = {models.actor: left_out if actor_learns else 0, models.critic: left_out}
    if options.critic_warmup_until and not actor_learns:  # its schedule does not depend on the warmup's end
        steps[models.actor] = options.updates_per_step
    for engine, number in steps.items():
        for _ in range(number if engine else 0):
            engine.lr_scheduler.step()


@torch.no_grad()
def _distance(actor: Engine, rollout: Rollout, options: PPOOptions) -> float:
    """KL from the rollout policy on the first responses, a quarter of a minibatch in complete groups: k2, in
    nats per response.
    """
    actor.eval()
    group, total = options.samples_per_prompt, 0.0
    first = range(math.ceil(options.global_batch_size / 4 / group) * group)
    for chunk in rollout.deal(first, micro_batch(options)):
        read = chunk or first[: rollout.sharing.responses]  # at ZeRO stage 3 every rank has to read something
        logprobs = policy_pass(actor, rollout.rows(read), options.temperature).logprobs
        if chunk:
            total += squared_change(logprobs, rollout.logprobs[chunk][rollout.response_mask[chunk]])
    actor.train()
    return sum_over_ranks(total)[0] / len(first)


def _micro_batches(
    rollout: Rollout, batch: list[int], advantages: Tensor, returns: Tensor | None, options: PPOOptions
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a minibatch. batch: the rows of the minibatch."""
    tokens = int(rollout.response_lengths[batch].sum())
    chunks = rollout.deal(batch, micro_batch(options))
    policy_weights = _weights(rollout, batch, options.loss_aggregation, options)
    value_weights = _weights(rollout, batch, "token", options)
    for number, chunk in enumerate(chunks, start=1):
        mask = rollout.response_mask[chunk]  # (b, R)
        yield MicroBatch(
            rollout.rows(chunk),
            chunk,
            rollout.response_lengths[chunk].tolist(),
            rollout.logprobs[chunk][mask],
            rollout.ref_logprobs[chunk][mask],
            advantages[chunk][mask],
            None if returns is None else rollout.values[chunk][mask],
            None if returns is None else returns[chunk][mask],
            policy_weights[chunk][mask],
            value_weights[chunk][mask],
            tokens,
            is_last=number == len(chunks),
        )


def _weights(rollout: Rollout, batch: list[int], aggregation: str, options: PPOOptions) -> Tensor:
    """Weights of the tokens of a minibatch in a loss: (B, R)."""
    lengths, counted = rollout.response_lengths[batch], rollout.ended[batch] | (not options.mask_truncated)
    weights = torch.zeros_like(rollout.logprobs)
    weights[batch] = token_weights(lengths, counted, aggregation, options.max_response_length)[:, None]
    return weights


def surrogate(logprobs: Tensor, batch: MicroBatch, options: PPOOptions) -> PolicyLoss:
    """The loss of each token by --policy_loss, without KL and entropy. logprobs: (N,)."""
    low, high, dual_clip = options.clip_range, options.clip_range_high, options.dual_clip
    numbers = logprobs, batch.logprobs, batch.advantages
    match options.policy_loss:
        case "ppo":
            return policy_loss(*numbers, low, dual_clip, high)
        case "gspo":
            return policy_loss(*numbers, low, dual_clip, high, batch.lengths)
        case "cispo":
            return clipped_weight_loss(*numbers, low, high)
        case _:
            assert_never(options.policy_loss)


def _update_actor(
    actor: Engine, batch: MicroBatch, options: PPOOptions, kl: KLPenalty, sums: Sums, gap: SamplerGap,
    experts: ExpertUse,
) -> float | None:  # fmt: skip
    """One micro-batch of the policy loss, with KL, entropy and load-balancing terms."""
    kind = "differentiable" if options.entropy_coef else "value"
    logprobs, entropy = policy_pass(actor, batch.rows, options.temperature, kind)
    gap.add(batch.numbers, logprobs, batch.is_last)
    result = surrogate(logprobs, batch, options)
    loss = kl.add_to_loss(result.loss, logprobs, batch.ref_logprobs)  # (N,)
    if options.entropy_coef:
        loss = loss - options.entropy_coef * entropy
    loss = (loss * batch.policy_weights).sum() / batch.tokens + experts.loss()
    norm = backward_and_step(actor, loss, world_size(), batch.is_last)
    with torch.no_grad():
        sums["policy/loss"] += (result.loss * batch.policy_weights).sum()
        sums["policy/ratio"] += result.ratio.sum()
        sums["policy/clip_fraction"] += result.clipped.sum()
        sums["policy/approx_kl"] += squared_change(logprobs, batch.logprobs)
        sums["policy/entropy"] += entropy.sum()
    return norm


def _values(critic: Engine, batch: MicroBatch) -> Tensor:
    """Values (N,) before the response tokens."""
    rows = batch.rows
    return token_scores(critic, rows.input_ids, rows.positions, **rows.layout(critic))


def _update_critic(
    critic: Engine, batch: MicroBatch, options: PPOOptions, sums: Sums, name: str, experts: ExpertUse
) -> float | None:
    """One micro-batch of the value loss, with the load-balancing term. name: of the metrics."""
    values = _values(critic, batch)
    result = value_loss(values, batch.values, batch.returns, options.value_clip_range)
    loss = (result.loss * batch.value_weights).sum()
    norm = backward_and_step(critic, loss / batch.tokens + experts.loss(), world_size(), batch.is_last)
    with torch.no_grad():
        sums[f"{name}/loss"] += loss
        sums[f"{name}/clip_fraction"] += result.clipped.sum()
    return norm

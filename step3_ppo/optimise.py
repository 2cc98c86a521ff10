"""The update of PPO: several epochs of minibatches over one rollout."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data import deal
from common.distributed import rank, sum_over_ranks
from common.engine import backward_and_step
from common.models import token_scores
from common.options import world_size
from common.tensor_ops import entropy
from step3_ppo.data import minibatches
from step3_ppo.losses import kl_loss, policy_loss, value_loss
from step3_ppo.models import Models
from step3_ppo.options import PPOOptions
from step3_ppo.pretraining import PretrainingMix
from step3_ppo.rollout import Rollout, Rows, actor_logprobs, take_rows
from step3_ppo.scoring import FirstPass

Sums = Counter[str]  # sums over tokens, turned into means at the end


class MicroBatch(NamedTuple):
    """A part of a minibatch: some rows, and what the rollout says of their N response tokens, row by row."""

    rows: Rows
    logprobs: Tensor  # (N,)
    ref_logprobs: Tensor  # (N,)
    advantages: Tensor  # (N,)
    values: Tensor | None  # (N,) where there is a critic
    returns: Tensor | None  # (N,) where there is a critic
    tokens: int  # of the whole minibatch, over all ranks
    is_last: bool  # of this rank's in the minibatch


def optimise(
    models: Models, rollout: Rollout, first_pass: FirstPass, advantages: Tensor, returns: Tensor | None,
    options: PPOOptions, kl_coef: float, pretraining: PretrainingMix | None, step: int,
) -> dict[str, float]:  # fmt: skip
    """Update actor and critic on every minibatch of every epoch; advantages and returns (B, R).

    first_pass: the forward passes of the first micro-batch, which scoring has made already. Epochs end early
    when the policy is further than --target_kl from that of the rollout; the learning rates go on as if they
    had not.
    Every loss is a mean over the tokens of the whole minibatch, however it is split over ranks and
    micro-batches. Returns means over the tokens of all updates, and how many were skipped because of numbers
    that are not finite; `policy/ratio` is that of the first minibatch, where it must be 1, and
    `policy/update_kl` is how far the policy was from the rollout's in the last one, nats per response (k2).
    """
    models.actor.train()
    if models.critic:
        models.critic.train()
    sums: Sums = Counter()
    first: dict[str, float] = {}
    norms: dict[str, float | None] = {}
    skipped, updates, update_kl, ptx_losses = 0, 0, 0.0, []
    size, actor_learns = options.global_batch_size, step > options.critic_warmup_steps
    for batch in minibatches(len(rollout.scores), size, options.ppo_epochs, options.seed, step):
        before = float(sums["policy/approx_kl"])
        if pretraining and actor_learns:
            ptx_losses.append(pretraining.add_gradients(models.actor))
        for micro in _micro_batches(rollout, batch, advantages, returns, options):
            if actor_learns:
                norms["policy/grad_norm"] = _update_actor(
                    models.actor, first_pass, micro, options, kl_coef, sums
                )
            if models.critic:
                norms["value/grad_norm"] = _update_critic(models.critic, first_pass, micro, options, sums)
            sums["tokens"] += len(micro.rows.labels)
        skipped += sum(norm is not None and not math.isfinite(norm) for norm in norms.values())
        updates += 1
        first = first or {name: float(total) for name, total in sums.items()}
        (moved,) = sum_over_ranks(sums["policy/approx_kl"] - before)
        update_kl = moved / len(batch)
        if update_kl > options.target_kl:
            break
    for engine in [models.actor] * actor_learns + [models.critic] * bool(models.critic):
        for _ in range(options.updates_per_step - updates):
            engine.lr_scheduler.step()
    found = _means(sums, first) | norms | {"policy/update_kl": update_kl}
    if ptx_losses:
        found["ptx/loss"] = sum_over_ranks(sum(ptx_losses))[0] / len(ptx_losses)
    return found | {"policy/updates": updates, "train/skipped_updates": skipped}


def _micro_batches(
    rollout: Rollout, batch: list[int], advantages: Tensor, returns: Tensor | None, options: PPOOptions
) -> Iterator[MicroBatch]:
    """This rank's part of a minibatch, which is these rows of the rollout."""
    tokens = int(rollout.response_lengths[batch].sum())
    mine = deal(batch, rollout.lengths.tolist(), options.micro_batch_size, rank(), world_size())
    for number, chunk in enumerate(mine, start=1):
        mask = rollout.response_mask[chunk]  # (b, R)
        yield MicroBatch(
            take_rows(rollout, chunk),
            rollout.logprobs[chunk][mask],
            rollout.ref_logprobs[chunk][mask],
            advantages[chunk][mask],
            None if returns is None else rollout.values[chunk][mask],
            None if returns is None else returns[chunk][mask],
            tokens,
            is_last=number == len(mine),
        )


def _means(sums: Sums, first: dict[str, float]) -> dict[str, float]:
    """Means over the tokens of all ranks and updates, but of the first minibatch for the ratio."""
    totals = [*sums.values(), first["tokens"], first.get("policy/ratio", 0.0)]
    *totals, first_tokens, first_ratio = sum_over_ranks(*totals)
    means = dict(zip(sums, totals, strict=True))
    count = means.pop("tokens")
    means = {name: total / count for name, total in means.items()}
    if "policy/ratio" in means:
        means["policy/ratio"] = first_ratio / first_tokens
    return means


def _update_actor(
    actor: Any, done: FirstPass, batch: MicroBatch, options: PPOOptions, kl_coef: float, sums: Sums
) -> float | None:
    """One micro-batch of the clipped policy loss, and of what stands beside it."""
    logprobs, logits = done.take_policy() or actor_logprobs(actor, batch.rows, options.temperature)
    result = policy_loss(logprobs, batch.logprobs, batch.advantages, options.clip_range, options.dual_clip)
    loss = result.loss  # (N,)
    if options.kl_penalty != "reward":
        loss = loss + kl_coef * kl_loss(logprobs, batch.ref_logprobs, options.kl_penalty)
    if options.entropy_coef:
        loss = loss - options.entropy_coef * entropy(logits, options.temperature)
    norm = backward_and_step(actor, loss.sum() / batch.tokens, world_size(), batch.is_last)
    with torch.no_grad():
        sums["policy/loss"] += result.loss.sum()
        sums["policy/ratio"] += result.ratio.sum()
        sums["policy/clip_fraction"] += result.clipped.sum()
        sums["policy/approx_kl"] += 0.5 * ((logprobs - batch.logprobs) ** 2).sum()
        sums["policy/entropy"] += entropy(logits, options.temperature).sum()
    return norm


def _update_critic(
    critic: Any, done: FirstPass, batch: MicroBatch, options: PPOOptions, sums: Sums
) -> float | None:
    """One micro-batch of the clipped value loss."""
    values = done.take_values()
    if values is None:
        values = token_scores(critic, batch.rows.input_ids, batch.rows.positions)
    result = value_loss(values, batch.values, batch.returns, options.value_clip_range)
    norm = backward_and_step(critic, result.loss.sum() / batch.tokens, world_size(), batch.is_last)
    with torch.no_grad():
        sums["value/loss"] += result.loss.sum()
        sums["value/clip_fraction"] += result.clipped.sum()
    return norm

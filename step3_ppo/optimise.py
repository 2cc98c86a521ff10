"""The update of PPO: several epochs of minibatches over one rollout."""

import math
from collections import Counter
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
from step3_ppo.losses import policy_loss, value_loss
from step3_ppo.models import Models
from step3_ppo.options import PPOOptions
from step3_ppo.rollout import Rollout, Rows, actor_logprobs, take_rows
from step3_ppo.scoring import FirstPass

Sums = Counter[str]  # sums over tokens, turned into means at the end


class Targets(NamedTuple):
    """What the rollout says of the N response tokens of a micro-batch, each (N,), row by row."""

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def optimise(
    models: Models, rollout: Rollout, first_pass: FirstPass, advantages: Tensor, returns: Tensor | None,
    options: PPOOptions, step: int,
) -> dict[str, float]:  # fmt: skip
    """Update actor and critic on every minibatch of every epoch; advantages and returns (B, R).

    first_pass: the forward passes of the first micro-batch, which scoring has made already.
    Every loss is a mean over the tokens of the whole minibatch, however it is split over ranks and
    micro-batches. Returns means over the tokens of all updates, and how many were skipped because of numbers
    that are not finite; `policy/ratio` is that of the first minibatch, where it must be 1.
    """
    models.actor.train()
    if models.critic:
        models.critic.train()
    lengths = rollout.lengths.tolist()
    # Without a critic nobody looks at returns.
    per_token = (rollout.logprobs, rollout.values, advantages, advantages if returns is None else returns)
    sums: Sums = Counter()
    first: dict[str, float] = {}
    norms: dict[str, float | None] = {}
    skipped = 0
    batches = minibatches(len(lengths), options.global_batch_size, options.ppo_epochs, options.seed, step)
    for batch in batches:
        tokens = int(rollout.response_lengths[batch].sum())
        mine = deal(batch, lengths, options.micro_batch_size, rank(), world_size())
        for number, chunk in enumerate(mine, start=1):
            rows, is_last = take_rows(rollout, chunk), number == len(mine)
            mask = rollout.response_mask[chunk]  # (b, R)
            targets = Targets(*(values[chunk][mask] for values in per_token))
            if step > options.critic_warmup_steps:
                norms["policy/grad_norm"] = _update_actor(
                    models.actor, first_pass, rows, targets, options, tokens, is_last, sums
                )
            if models.critic:
                norms["value/grad_norm"] = _update_critic(
                    models.critic, first_pass, rows, targets, options, tokens, is_last, sums
                )
            sums["tokens"] += len(rows.labels)
        skipped += sum(norm is not None and not math.isfinite(norm) for norm in norms.values())
        first = first or {name: float(total) for name, total in sums.items()}
    totals = [*sums.values(), first["tokens"], first.get("policy/ratio", 0.0)]
    *totals, first_tokens, first_ratio = sum_over_ranks(*totals)
    means = dict(zip(sums, totals, strict=True))
    count = means.pop("tokens")
    means = {name: total / count for name, total in means.items()}
    if "policy/ratio" in means:
        means["policy/ratio"] = first_ratio / first_tokens
    return means | norms | {"train/skipped_updates": skipped}


def _update_actor(
    actor: Any, done: FirstPass, rows: Rows, old: Targets, options: PPOOptions, tokens: int, is_last: bool,
    sums: Sums,
) -> float | None:  # fmt: skip
    """One micro-batch of the clipped policy loss, a part of a minibatch of so many tokens."""
    logprobs, logits = done.take_policy() or actor_logprobs(actor, rows, options.temperature)
    result = policy_loss(logprobs, old.logprobs, old.advantages, options.clip_range, options.dual_clip)
    norm = backward_and_step(actor, result.loss.sum() / tokens, world_size(), is_last)
    with torch.no_grad():
        sums["policy/loss"] += result.loss.sum()
        sums["policy/ratio"] += result.ratio.sum()
        sums["policy/clip_fraction"] += result.clipped.sum()
        sums["policy/approx_kl"] += 0.5 * ((logprobs - old.logprobs) ** 2).sum()
        sums["policy/entropy"] += entropy(logits, options.temperature).sum()
    return norm


def _update_critic(
    critic: Any, done: FirstPass, rows: Rows, old: Targets, options: PPOOptions, tokens: int, is_last: bool,
    sums: Sums,
) -> float | None:  # fmt: skip
    """One micro-batch of the clipped value loss, a part of a minibatch of so many tokens."""
    values = done.take_values()
    if values is None:
        values = token_scores(critic, rows.input_ids, rows.positions)
    result = value_loss(values, old.values, old.returns, options.value_clip_range)
    norm = backward_and_step(critic, result.loss.sum() / tokens, world_size(), is_last)
    with torch.no_grad():
        sums["value/loss"] += result.loss.sum()
        sums["value/clip_fraction"] += result.clipped.sum()
    return norm

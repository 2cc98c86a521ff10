"""The update of PPO: several epochs of minibatches over one rollout."""

from collections import Counter
from typing import Any

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
from step3_ppo.rollout import Rollout, actor_logprobs, take_rows

Sums = Counter[str]  # sums over tokens, turned into means at the end


def optimise(
    models: Models, rollout: Rollout, advantages: Tensor, returns: Tensor, options: PPOOptions, step: int
) -> dict[str, float]:
    """Update actor and critic on every minibatch of every epoch; advantages and returns (B, R).

    Every loss is a mean over the tokens of the whole minibatch, however it is split over ranks and
    micro-batches. Returns means over the tokens of all updates; `policy/ratio` is that of the first
    minibatch, where it must be 1.
    """
    models.actor.train()
    models.critic.train()
    lengths = (rollout.prompt_lengths + rollout.response_lengths).tolist()
    mask = rollout.response_mask
    sums: Sums = Counter()
    norms: dict[str, float] = {}
    rows, size = len(lengths), options.global_batch_size
    for number, batch in enumerate(minibatches(rows, size, options.ppo_epochs, options.seed, step)):
        tokens = int(rollout.response_lengths[batch].sum())
        mine = deal(batch, lengths, options.micro_batch_size, rank(), world_size())
        for j, chunk in enumerate(mine, start=1):
            index = torch.tensor(chunk, device=mask.device)
            chosen = mask[index]  # (b, R), and below each x[index][chosen] is (N,), row by row
            is_last = j == len(mine)
            if step > options.critic_warmup_steps:
                norm = _actor_update(
                    models.actor, rollout, chunk, rollout.logprobs[index][chosen], advantages[index][chosen],
                    options, tokens, is_last, sums, is_first=number == 0,
                )  # fmt: skip
                norms["policy/grad_norm"] = norm
            norms["value/grad_norm"] = _critic_update(
                models.critic, rollout, chunk, rollout.values[index][chosen], returns[index][chosen],
                options, tokens, is_last, sums,
            )  # fmt: skip
    names = sorted(sums)
    sums = Counter(dict(zip(names, sum_over_ranks(*(sums[name] for name in names)), strict=True)))
    first, updates = max(sums.pop("first_tokens", 0), 1), max(sums.pop("tokens"), 1)
    means = {name: value / (first if name == "policy/ratio" else updates) for name, value in sums.items()}
    return means | norms


def _actor_update(
    actor: Any, rollout: Rollout, chunk: list[int], old_logprobs: Tensor, advantages: Tensor,
    options: PPOOptions, tokens: int, is_last: bool, sums: Sums, is_first: bool,
) -> float | None:  # fmt: skip
    """One micro-batch of the clipped policy loss; old_logprobs and advantages (N,)."""
    logprobs, logits = actor_logprobs(actor, take_rows(rollout, chunk), options.temperature)
    result = policy_loss(logprobs, old_logprobs, advantages, options.clip_range, options.dual_clip)
    norm = backward_and_step(actor, result.loss.sum() / tokens, world_size(), is_last)
    with torch.no_grad():
        sums["policy/loss"] += result.loss.sum()
        sums["policy/clip_fraction"] += result.clipped.sum()
        sums["policy/approx_kl"] += 0.5 * ((logprobs - old_logprobs) ** 2).sum()
        sums["policy/entropy"] += entropy(logits, options.temperature).sum()
        if is_first:
            sums["policy/ratio"] += result.ratio.sum()
            sums["first_tokens"] += len(logprobs)
    return norm


def _critic_update(
    critic: Any, rollout: Rollout, chunk: list[int], old_values: Tensor, returns: Tensor,
    options: PPOOptions, tokens: int, is_last: bool, sums: Sums,
) -> float | None:  # fmt: skip
    """One micro-batch of the clipped value loss; old_values and returns (N,)."""
    rows = take_rows(rollout, chunk)
    values = token_scores(critic, rows.input_ids, rows.positions)
    result = value_loss(values, old_values, returns, options.value_clip_range)
    norm = backward_and_step(critic, result.loss.sum() / tokens, world_size(), is_last)
    sums["value/loss"] += result.loss.detach().sum()
    sums["value/clip_fraction"] += result.clipped.sum()
    sums["tokens"] += len(values)
    return norm

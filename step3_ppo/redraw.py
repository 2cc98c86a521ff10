"""Groups of responses with equal scores, replaced by groups of other prompts (dynamic sampling of DAPO)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from common.data.examples import Examples
from common.runtime.options import world_size
from common.training.means import Mean
from step3_ppo.models import Models
from step3_ppo.objectives import scores_within_rollout
from step3_ppo.options import PPOOptions
from step3_ppo.rollout import Rollout, concatenate, sample_rollout
from step3_ppo.scoring import score_rollout

PROMPT_STREAM = 5  # random stream of the other prompts, separate from those of data order and sampling
STEPS = 1 << 41  # sampling steps between attempts, beyond training and evaluation


def has_spread(scores: Tensor, group: int) -> Tensor:
    """Whether a group of responses has different scores, so that some are better than their mean.

    scores: (B,), groups of neighbours. Returns (B / group,). Source: Yu et al. 2025 (DAPO), eq. 11.
    """
    groups = scores.view(-1, group)
    return groups.amax(1) > groups.amin(1)


def other_prompts(count: int, used: Sequence[int], total: int, seed: int, step: int) -> list[int]:
    """Draw numbers of up to `count` prompts that were not used in this step, the same on every rank."""
    unused = np.setdiff1d(np.arange(total), used)
    return np.random.default_rng((seed, PROMPT_STREAM, step)).permutation(unused)[:count].tolist()


def redraw_equal_groups(
    models: Models, train: Examples, used: Sequence[int], rollout: Rollout, options: PPOOptions, step: int,
    before_attempt: Callable[[], None] = lambda: None,
) -> tuple[Rollout, dict[str, Mean]]:  # fmt: skip
    """Replace groups with equal scores by groups of other prompts, in at most --max_redraws attempts.

    used: numbers of the rollout's prompts. before_attempt: may raise, to stop. Returns the scored rollout,
    and metrics. What is drawn is a function of seed, step and weights. Attempts end early when prompts run
    out.
    """
    group, drawn, seen = options.samples_per_prompt, 0, {*used}
    if group == 1:
        return rollout, {}

    def spread_of(scored: Rollout) -> Tensor:
        return has_spread(scores_within_rollout(scored, models.scorer, options), group)

    first = spread = spread_of(rollout)
    for attempt in range(1, options.max_redraws + 1):
        if spread.all():
            break
        equal = (~spread).nonzero()[:, 0].tolist()
        others = other_prompts(len(equal), [*seen], len(train), options.seed, step + attempt * STEPS)
        if not others:
            break
        before_attempt()
        padded = [*others, *others[:1] * (-len(others) % world_size())]  # every rank samples as many
        prompts = [train[i] for i in padded for _ in range(group)]
        new = sample_rollout(models.sampler, models.encoder, prompts, options, step + attempt * STEPS)
        new = score_rollout(models, prompts, replace(new, sharing=rollout.sharing), options)
        new = new.pick(range(len(others) * group))
        groups = [*range(len(spread))]
        better = spread_of(new).nonzero()[:, 0].tolist()
        for slot, other in zip(equal, better, strict=False):
            groups[slot] = len(spread) + other
        rows = [number * group + row for number in groups for row in range(group)]
        rollout = concatenate(rollout, new).pick(rows)
        spread, seen, drawn = spread_of(rollout), seen | {*others}, drawn + len(others)
    metrics = {
        "rollout/equal_groups": 1 - first.float().mean().item(),
        "rollout/equal_groups_left": 1 - spread.float().mean().item(),
        "rollout/redrawn_groups": drawn,
    }
    return rollout, {name: Mean(value) for name, value in metrics.items()}

"""Scores by --normalise_scores: as they are, normalised as a sum, or part by part before the weights.

A part is the score by one reward model or one function. An ensemble of reward models is combined, by
--reward_combine, after each of them is standardised. Scores of steps stay as they are.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from torch import Tensor

from step3_ppo.models import Scorer
from step3_ppo.options import PPOOptions
from step3_ppo.rewards import RunningScale, scales_of, standardised, update_scales
from step3_ppo.rollout import Rollout
from step3_ppo.scoring import combine_parts
from step3_ppo.state import PPOState


def normalised_scores(rollout: Rollout, scorer: Scorer, options: PPOOptions, state: PPOState) -> Tensor:
    """Scores (B,) of whole responses, for their rewards. The rollout joins the scales in the state."""
    parts = _parts(rollout, scorer)
    # Not as a difference from the scores of steps, whose rounding would be normalised.
    scores = combine_parts(parts, scorer) if scorer.process else rollout.scores
    match options.normalise_scores:
        case "off":
            return scores
        case "sum":
            state.score_scale.update(scores)
            return state.score_scale.apply(scores)
        case "each":
            if state.part_scales:
                update_scales(state.part_scales, parts)
            else:
                state.part_scales = scales_of(parts)
            return combine_parts(standardised(parts, state.part_scales), scorer)
        case _:
            assert_never(options.normalise_scores)


def comparable_scores(rollout: Rollout, scorer: Scorer, options: PPOOptions, state: PPOState) -> Rollout:
    """With `each`, the rollout with scores for metrics: on the scales of the first responses of the run.

    They can be compared over the run, which running scales do not allow, and weigh the parts as the rewards
    do. The first call of a run sets the scales: on held-out prompts before the first step; without any, on
    the first rollout.
    """
    if options.normalise_scores != "each":
        return rollout
    state.first_scales = state.first_scales or scales_of(_parts(rollout, scorer))
    return replace(rollout, scores=_on_scales(state.first_scales, rollout, scorer))


def scores_within_rollout(rollout: Rollout, scorer: Scorer, options: PPOOptions) -> Tensor:
    """Scores (B,) that are equal where rewards will be.

    With `each`, parts can cancel out in the sum and not once they are standardised.
    """
    if options.normalise_scores != "each":
        return rollout.scores
    return _on_scales(scales_of(_parts(rollout, scorer)), rollout, scorer)


def _on_scales(scales: Sequence[RunningScale], rollout: Rollout, scorer: Scorer) -> Tensor:
    """Scores (B,) of standardised parts, and of the steps as they are."""
    return combine_parts(standardised(_parts(rollout, scorer), scales), scorer) + rollout.step_scores.sum(1)


def _parts(rollout: Rollout, scorer: Scorer) -> Tensor:
    """Scores of whole responses by each reward model and function (B, M + F)."""
    return rollout.score_parts[:, : len(scorer.rewards) + len(scorer.functions)]

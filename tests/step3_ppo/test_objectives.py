"""Several reward models and functions, each standardised before its weight."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from step3_ppo.kl_penalty import KLPenalty
from step3_ppo.metrics import describe_parts, part_means
from step3_ppo.models import Scorer
from step3_ppo.objectives import comparable_scores, normalised_scores, scores_within_rollout
from step3_ppo.options import PPOOptions
from step3_ppo.redraw import redraw_equal_groups
from step3_ppo.rewards import RunningScale
from step3_ppo.rollout import Rollout
from step3_ppo.scoring import combine_parts
from step3_ppo.state import PPOState
from tests.conftest import assert_close
from tests.step3_ppo.rollouts import rollout_of

WEIGHTS = (0.5, -2.0)  # of two functions
DRAW = np.random.default_rng(0)
# Two rollouts of 6 responses, scored by two reward models and two functions on unlike scales, in fp32.
PARTS = [DRAW.normal(size=(6, 4)) * (1, 3, 200, 0.01) + (0, 1, -500, 7) for _ in range(2)]
PARTS = [parts.astype(np.float32).astype(np.float64) for parts in PARTS]


def scorer_of(members: int = 2, weights: tuple[float, ...] = WEIGHTS, **options: Any) -> Scorer:
    functions = [
        SimpleNamespace(name=f"f{number}", weight=weight) for number, weight in enumerate(weights, start=1)
    ]
    return Scorer([None] * members, functions, PPOOptions(**options))


def scored(parts: np.ndarray, scorer: Scorer) -> Rollout:
    """A rollout with these parts of its scores (B, P), and their weighted sum."""
    tensor, ones = torch.tensor(parts, dtype=torch.float32), torch.ones(len(parts), dtype=torch.long)
    rollout = rollout_of(torch.ones(len(parts), 2, dtype=torch.long), ones, ones, ones > 0)
    return replace(rollout, score_parts=tensor, scores=combine_parts(tensor, scorer))


def state() -> PPOState:
    return PPOState(KLPenalty(0.1), RunningScale())


def normalise(how: str, rollouts: list[np.ndarray], scorer: Scorer) -> Tensor:
    """Scores of the last rollout, after the others."""
    options, before = PPOOptions(normalise_scores=how), state()
    for parts in rollouts:
        scores = normalised_scores(scored(parts, scorer), scorer, options, before)
    return scores


def z(parts: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return (parts - seen.mean(0)) / seen.std(0)


def test_each_part_has_its_own_mean_and_std_over_all_rollouts_before_its_weight():
    apart = z(PARTS[1], np.concatenate(PARTS))
    expected = apart[:, :2].mean(1) + apart[:, 2:] @ WEIGHTS
    assert_close(normalise("each", PARTS, scorer_of()), torch.tensor(expected, dtype=torch.float32))
    total = [parts[:, :2].mean(1) + parts[:, 2:] @ WEIGHTS for parts in PARTS]
    expected = torch.tensor(z(total[1], np.concatenate(total)), dtype=torch.float32)
    assert_close(normalise("sum", PARTS, scorer_of()), expected, rtol=1e-4)
    assert_close(normalise("off", PARTS, scorer_of()), torch.tensor(total[1], dtype=torch.float32))


def test_a_weight_means_the_same_whatever_the_scale_of_a_part():
    scaled = [parts / (1, 1, 100, 1) - (0, 0, 3, 0) for parts in PARTS]
    assert_close(normalise("each", scaled, scorer_of()), normalise("each", PARTS, scorer_of()))
    for how in ("off", "sum"):
        difference = normalise(how, scaled, scorer_of()) - normalise(how, PARTS, scorer_of())
        assert difference.abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"reward_combine": "min"}, lambda a: a.min(1)),
        ({"reward_weights": [1.0, 3.0]}, lambda a: a @ (0.25, 0.75)),
        ({"reward_combine": "mean_std", "reward_std_coef": 0.5}, lambda a: a.mean(1) - 0.5 * a.std(1)),
    ],
)
def test_an_ensemble_is_combined_after_its_members_are_standardised(options, expected):
    members = [parts[:, :2] for parts in PARTS]
    combined = expected(z(members[1], np.concatenate(members)))
    scores = normalise("each", members, scorer_of(weights=(), **options))
    assert_close(scores, torch.tensor(combined, dtype=torch.float32))


def test_equal_scores_of_a_part_add_nothing():
    """Also where single precision would round their mean."""
    parts = np.stack([np.linspace(-1, 1, 100), np.full(100, 1000.1)], axis=1)
    scorer = scorer_of(members=0, weights=(1.0, 1.0))
    alone = scorer_of(members=0, weights=(1.0,))
    for how in ([parts], [parts, parts]):
        without = normalise("each", [rollout[:, :1] for rollout in how], alone)
        assert torch.equal(normalise("each", how, scorer), without)


def test_metrics_are_on_the_scale_of_the_first_responses():
    scorer, options, now = scorer_of(), PPOOptions(normalise_scores="each"), state()
    for parts in (*PARTS, PARTS[1]):
        rollout = comparable_scores(scored(parts, scorer), scorer, options, now)
        apart = z(parts, PARTS[0])
        expected = apart[:, :2].mean(1) + apart[:, 2:] @ WEIGHTS
        assert_close(rollout.scores, torch.tensor(expected, dtype=torch.float32))
        normalised_scores(rollout, scorer, options, now)
        now = PPOState.load(options, now.plain())
    assert [scale.count for scale in now.first_scales + now.part_scales] == [6] * 4 + [18] * 4
    for how in ("off", "sum"):
        plain = scored(PARTS[0], scorer)
        assert comparable_scores(plain, scorer, PPOOptions(normalise_scores=how), state()) is plain


def test_mean_and_std_of_each_part_are_metrics():
    rollout, scorer = scored(PARTS[0], scorer_of()), scorer_of()
    figures = describe_parts(scorer, rollout)
    names = ["1", "2", "f1", "f2"]
    means, stds = PARTS[0].mean(0), PARTS[0].std(0)
    expected = {f"reward/mean_{name}": mean for name, mean in zip(names, means, strict=True)}
    expected |= {f"reward/std_{name}": std for name, std in zip(names, stds, strict=True)}
    expected["reward/std_between"] = PARTS[0][:, :2].std(1).mean()
    assert figures == pytest.approx(expected, rel=1e-4)
    assert part_means(scorer, rollout) == pytest.approx(dict(zip(names, means, strict=True)), rel=1e-5)
    alone = scorer_of(members=1, weights=())
    assert describe_parts(alone, scored(PARTS[0][:, :1], alone)) == {}


def test_parts_that_cancel_out_in_the_sum_still_tell_responses_apart():
    """Of two right or wrong functions, the second is right more often."""
    parts = np.array([[1, 0], [0, 1], [0, 1], [0, 1], [1, 1], [1, 1]], dtype=np.float32)
    scorer = scorer_of(members=0, weights=(1.0, 1.0))
    rollout = replace(scored(parts, scorer), behaviour_logprobs=torch.zeros(6, 1))
    each = scores_within_rollout(rollout, scorer, PPOOptions(normalise_scores="each"))
    expected = z(parts, parts).sum(1)
    assert_close(each, torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(scores_within_rollout(rollout, scorer, PPOOptions()), torch.tensor(parts.sum(1)))
    for how, equal in (("off", 1.0), ("sum", 1.0), ("each", 2 / 3)):
        options = PPOOptions(samples_per_prompt=2, normalise_scores=how)
        _, figures = redraw_equal_groups(SimpleNamespace(scorer=scorer), [], [], rollout, options, 1)
        assert figures["rollout/equal_groups"].value == pytest.approx(equal)


def test_scores_of_steps_stay_as_they_are():
    """Added after the parts are standardised, for metrics; the rewards hold them apart."""
    steps = torch.tensor([[-0.5], [-1.0], [0.0], [-2.0], [-0.1], [-0.3]])
    plain, options = scored(PARTS[0], scorer_of()), PPOOptions(normalise_scores="each")
    parts = torch.cat([plain.score_parts, steps], 1)
    rollout = replace(plain, score_parts=parts, step_scores=steps, scores=plain.scores + steps[:, 0])
    scorer = replace(scorer_of(), process=SimpleNamespace())
    for how in ("off", "sum", "each"):
        before = PPOOptions(normalise_scores=how)
        scores = normalised_scores(rollout, scorer, before, state())
        assert_close(scores, normalise(how, [PARTS[0]], scorer_of()), rtol=1e-4)
    expected = comparable_scores(plain, scorer_of(), options, state()).scores + steps[:, 0]
    assert_close(comparable_scores(rollout, scorer_of(), options, state()).scores, expected)
    alone = replace(rollout, score_parts=steps, scores=steps[:, 0])
    no_parts = scorer_of(members=0, weights=())
    assert torch.equal(normalised_scores(alone, no_parts, options, state()), torch.zeros(6))


@pytest.mark.parametrize("how", ["sum", "each"])
@pytest.mark.parametrize("value", [0.1, 100.1, -1e6])
def test_equal_scores_are_not_normalised_to_their_rounding_errors(how, value):
    """Neither those of the mean of many, nor those of a sum from which the scores of steps are taken."""
    count, steps = 19, torch.linspace(-3.0, -0.1, 19)[:, None].expand(-1, 3) * 0.3
    equal, scorer = torch.full((count, 1), value), scorer_of(members=0, weights=(0.7,))
    alike = scored(equal.numpy(), scorer)
    assert normalised_scores(alike, scorer, PPOOptions(normalise_scores=how), state()).unique().tolist() == [
        0
    ]
    ones = torch.ones(count, dtype=torch.long)
    rollout = rollout_of(torch.ones(count, 4, dtype=torch.long), ones, 3 * ones, ones > 0)
    rollout = replace(
        rollout, step_scores=steps, scores=alike.scores + steps.sum(1),
        score_parts=torch.cat([equal, steps.sum(1, keepdim=True)], 1),
    )  # fmt: skip
    scorer = replace(scorer, process=SimpleNamespace())
    assert normalised_scores(
        rollout, scorer, PPOOptions(normalise_scores=how), state()
    ).unique().tolist() == [0]


@pytest.mark.parametrize("members", [0, 2])
def test_responses_with_equal_parts_have_equal_scores_in_a_batch_of_any_size(members):
    draw = np.random.default_rng(1)
    for weights, count in product([(0.3, 0.7), (1.1, -0.3, 0.7), (*draw.normal(size=5),)], range(1, 34)):
        row = torch.tensor(draw.normal(size=members + len(weights)), dtype=torch.float32)
        scorer = scorer_of(members, weights, reward_combine="mean_std")
        assert len(combine_parts(row.repeat(count, 1), scorer).unique()) == 1, (weights, count)

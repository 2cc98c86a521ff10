"""From scores to rewards, computed by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.model.options import EnsembleOptions
from step3_ppo.kl_penalty import KLPenalty
from step3_ppo.models import Scorer
from step3_ppo.options import PPOOptions
from step3_ppo.returns import estimate_advantages, shape_rewards
from step3_ppo.rewards import RunningScale
from step3_ppo.rollout import Rollout
from step3_ppo.state import PPOState
from tests.conftest import assert_close
from tests.step3_ppo.rollouts import rollout_of

# Two responses to prompts of one token: four tokens with a repeated trigram, truncated; two tokens, ended.
PLAIN = {"score_clip": 0.0, "missing_eos_penalty": 0.0, "kl_coef": 0.0}
SCORER = Scorer([], [], EnsembleOptions())
LOGPROBS, REF_LOGPROBS = (
    [[-1.0, -2.0, -0.5, -1.0], [-1.5, -1.0, 0, 0]],
    [[-1.5, -1.0, -1.0, -1.0], [-2, -2, 0, 0]],
)


def rollout(scores: list[float]) -> Rollout:
    return rollout_of(
        torch.tensor([[1, 5, 5, 5, 5], [1, 6, 2, 0, 0]]), torch.tensor([1, 1]), torch.tensor([4, 2]),
        torch.tensor([False, True]), logprobs=torch.tensor(LOGPROBS), ref_logprobs=torch.tensor(REF_LOGPROBS),
        scores=torch.tensor(scores),
    )  # fmt: skip


def state(kl_coef: float, kind: str = "reward") -> PPOState:
    return PPOState(KLPenalty(kl_coef, kind), RunningScale())


@pytest.mark.parametrize(
    "options, expected, clipped, penalty",
    [
        ({}, [3.0, -7.0], 0, 0),
        ({"score_clip": 5.0}, [3.0, -5.0], 0.5, 0),
        ({"missing_eos_penalty": 2.0}, [1.0, -7.0], 0, 1.0),
        ({"length_penalty": 0.25}, [2.0, -7.5], 0, 0.75),
        ({"repetition_penalty": 4.0}, [1.0, -7.0], 0, 1.0),  # one of two trigrams is a repetition
        # Of a buffer of 4, the lengths 4 and 2 of at most 5 use 3 / 4 and 1 / 4.
        (
            {"overlong_buffer": 4, "overlong_penalty": 2.0, "max_response_length": 5},
            [1.5, -7.5],
            0,
            1.0,
        ),
        ({"normalise_scores": "sum"}, [1.0, -1.0], 0, 0),  # mean -2, standard deviation 5
        (
            {"score_clip": 5.0, "missing_eos_penalty": 4.0},
            [-1.0, -5.0],
            0.5,
            2.0,
        ),  # penalties are not clipped
    ],
)
def test_scores_are_clipped_normalised_and_penalised(options, expected, clipped, penalty):
    rewards, figures = shape_rewards(rollout([3.0, -7.0]), SCORER, PPOOptions(**PLAIN | options), state(0.0))
    assert_close(rewards, torch.tensor([[0, 0, 0, expected[0]], [0, expected[1], 0, 0]]))
    assert figures["reward/clipped"].value == clipped
    assert figures["reward/penalty"].value == pytest.approx(penalty)
    assert figures["reward/total"].value == pytest.approx(sum(expected) / 2)


def test_scores_of_steps_are_clipped_alone_and_stay_on_their_tokens():
    """The score of a rollout holds those of its steps; only that of the whole response is normalised."""
    steps = torch.tensor([[0, -1.0, 0, -8.0], [0, -2.0, 0, 0]])
    parts = torch.tensor([[3.0, -9.0], [-7.0, -2.0]])
    scored = replace(
        rollout([3.0 - 9.0, -7.0 - 2.0]), step_scores=steps, step_ends=steps < 0, score_parts=parts
    )
    scorer = Scorer([], [SimpleNamespace(weight=1.0)], EnsembleOptions(), process=SimpleNamespace())
    rewards, figures = shape_rewards(scored, scorer, PPOOptions(**PLAIN), state(0.0))
    assert_close(rewards, torch.tensor([[0, -1.0, 0, 3.0 - 8.0], [0, -9.0, 0, 0]]))
    assert figures["reward/clipped"].value == 0
    rewards, figures = shape_rewards(scored, scorer, PPOOptions(**PLAIN | {"score_clip": 5.0}), state(0.0))
    assert_close(rewards, torch.tensor([[0, -1.0, 0, 3.0 - 5.0], [0, -5.0 - 2.0, 0, 0]]))
    assert figures["reward/clipped"].value == 0.5
    rewards, _ = shape_rewards(scored, scorer, PPOOptions(**PLAIN, normalise_scores="sum"), state(0.0))
    assert_close(rewards, torch.tensor([[0, -1.0, 0, 1.0 - 8.0], [0, -1.0 - 2.0, 0, 0]]))


def test_kl_is_subtracted_at_every_token_with_the_current_coefficient():
    scored, options = rollout([3.0, -7.0]), PPOOptions(**PLAIN)
    rewards, figures = shape_rewards(scored, SCORER, options, state(0.5))
    assert_close(rewards, torch.tensor([[-0.25, 0.5, -0.25, 3.0], [-0.25, -7.5, 0, 0]]))
    assert figures["reward/total"].value == pytest.approx((3.0 - 7.75) / 2)
    rewards, _ = shape_rewards(scored, SCORER, options, state(0.5, "k2"))
    assert_close(rewards, torch.tensor([[0, 0, 0, 3.0], [0, -7.0, 0, 0]]))


def test_whitened_rewards_have_variance_one_and_keep_their_mean():
    scored, options = rollout([3.0, -7.0]), PPOOptions(**PLAIN, whiten_rewards=True)
    rewards, figures = shape_rewards(scored, SCORER, options, state(0.5))
    plain = torch.tensor([-0.25, 0.5, -0.25, 3.0, -0.25, -7.5])
    whitened = torch.cat([rewards[0], rewards[1, :2]])
    assert_close(whitened, (plain - plain.mean()) / plain.std() + plain.mean())
    assert not rewards[1, 2:].any() and figures["reward/total"].value == pytest.approx(plain.sum().item() / 2)


def test_scores_are_normalised_over_all_rollouts():
    options, scores_so_far = PPOOptions(**PLAIN, normalise_scores="sum"), state(0.0)
    shape_rewards(rollout([3.0, -7.0]), SCORER, options, scores_so_far)
    rewards, _ = shape_rewards(rollout([1.0, 0.0]), SCORER, options, scores_so_far)
    scores = torch.tensor([3.0, -7.0, 1.0, 0.0])
    expected = (scores[2:] - scores.mean()) / scores.std(unbiased=False)
    assert_close(rewards.sum(1), expected)


def test_equal_rewards_have_no_advantage_over_their_mean():
    """With the batch baseline of reinforce, rounding of the mean is no advantage."""
    equal = rollout_of(
        torch.ones(7, 2, dtype=torch.long), torch.ones(7, dtype=torch.long), torch.ones(7, dtype=torch.long),
        torch.ones(7, dtype=torch.bool),
    )  # fmt: skip
    options = PPOOptions(**PLAIN, advantage_estimator="reinforce")
    advantages, _ = estimate_advantages(equal, torch.full((7, 1), 1000.1), options, state(0.0))
    assert advantages.tolist() == [[0.0]] * 7

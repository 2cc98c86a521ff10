"""KL per token, reward per token, and the scale of scores."""

import pytest
import torch

from step3_ppo.rewards import (
    RunningScale,
    aggregate_steps,
    clip_scores,
    overlong_shares,
    repeated_share,
    token_kl,
    token_rewards,
)
from tests.conftest import assert_close


def test_token_kl_is_the_k1_estimate(reference):
    case = reference("ppo.kl_estimators")
    mask = torch.ones_like(case.outputs.k1, dtype=torch.bool)
    assert_close(token_kl(case.inputs.logprobs, case.inputs.ref_logprobs, mask), case.outputs.k1)
    mask[1, 2:] = False
    assert_close(token_kl(case.inputs.logprobs, case.inputs.ref_logprobs, mask), case.outputs.k1 * mask)


def test_penalty_matches_the_reference(reference):
    case = reference("ppo.gae.default")
    mask = ~case.outputs.padding_mask
    kl = token_kl(case.inputs.logprobs, case.inputs.ref_logprobs, mask)
    rewards = token_rewards(torch.zeros(4), kl, mask.sum(1), kl_coef=case.params.kl_coef.item())
    assert_close(rewards, case.outputs.non_score_reward)


def test_score_is_added_at_the_last_token():
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.0, 0.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, torch.tensor([3, 1]), kl_coef=0.5)
    assert_close(rewards, torch.tensor([[-0.05, 0.1, 1.85], [-1.25, 0.0, 0.0]]))
    assert_close(kl, torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.0, 0.0]]))  # unchanged


def test_scores_of_steps_are_added_at_their_last_tokens():
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.0, 0.0]])
    steps = torch.tensor([[-1.0, 0.0, -2.0], [-3.0, 0.0, 0.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, torch.tensor([3, 1]), 0.5, steps)
    assert_close(rewards, torch.tensor([[-1.05, 0.1, -0.15], [-4.25, 0.0, 0.0]]))


def test_aggregated_steps_by_hand():
    """Probabilities 1/2, 1/8 and 1/4 of three steps; one step of 1/2; a last step that is surely right."""
    probabilities = torch.tensor([[0.5, 0.125, 1.0, 0.25], [1.0, 0.5, 1.0, 1.0], [0.5, 1.0, 1.0, 1.0]])
    ends = torch.tensor([[True, True, False, True], [False, True, False, False], [True, False, True, False]])
    for how, expected in {
        "product": [1 / 64, 1 / 2, 1 / 2], "min": [1 / 8, 1 / 2, 1 / 2], "last": [1 / 4, 1 / 2, 1],
    }.items():  # fmt: skip
        assert_close(aggregate_steps(probabilities.log(), ends, how), torch.tensor(expected).log())


def test_clip_scores():
    scores = torch.tensor([-12.0, 3.0, 12.0])
    assert clip_scores(scores, 10.0).tolist() == [-10.0, 3.0, 10.0]
    assert clip_scores(scores, 0.0).tolist() == [-12.0, 3.0, 12.0]


def test_overlong_shares_by_hand():
    """DAPO, eq. 13: none up to 12 of 16 tokens, all at the limit."""
    lengths = torch.tensor([1, 12, 13, 14, 16])
    assert overlong_shares(lengths, 16, 4).tolist() == [0.0, 0.0, 0.25, 0.5, 1.0]
    assert overlong_shares(torch.tensor([1, 16]), 16, 16).tolist() == [1 / 16, 1.0]


def test_running_scale_equals_that_of_all_scores():
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 7 + 3
    scale = RunningScale()
    for batch in scores:
        scale.update(batch)
    assert scale.mean == pytest.approx(scores.mean().item(), rel=1e-12)
    assert_close(scale.apply(scores[0]), (scores[0] - scores.mean()) / scores.std(unbiased=False))


@pytest.mark.parametrize("score", [0.1, 9.7, 1000.1])
def test_equal_scores_are_centred(score):
    """Rounding of their mean is no deviation to divide by."""
    scores, scale = torch.full((96,), score), RunningScale()
    for _ in range(2):
        scale.update(scores)
        assert scale.apply(scores).tolist() == [0.0] * 96


@pytest.mark.parametrize(
    "ids, expected",
    [([], 0.0), ([1, 2], 0.0), ([1, 2, 3, 4], 0.0), ([1, 1, 1, 1, 1], 2 / 3), ([1, 2] * 3, 0.5)],
)
def test_repeated_share_by_hand(ids, expected):
    assert repeated_share(ids) == pytest.approx(expected)

"""Advantage estimators, compared with other implementations and closed forms."""

import pytest
import torch

from common.numeric.tensor_ops import masked_whiten
from step3_ppo.advantages import (
    discounted_sums,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    length_adaptive_lambda,
    reinforce_advantages,
    whitened_returns,
)
from tests.conftest import assert_close

MASK = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]


def random_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and values, with large values outside the mask."""
    rewards, values = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    return torch.where(MASK, rewards, 1e3), torch.where(MASK, values, -1e3)


@pytest.mark.parametrize("name", ["default", "gae1", "td0"])
def test_advantages_match_the_reference(reference, name):
    """The reference pays the score one position after the last token, so its mask is one longer."""
    case = reference(f"ppo.gae.{name}")
    mask, gamma, gae_lambda = ~case.outputs.padding_mask_p1, case.params.gamma, case.params.lam
    advantages, returns = generalised_advantages(
        case.outputs.rewards, case.inputs.values, mask, gamma, gae_lambda
    )
    assert_close(advantages, case.outputs.advantages_raw)
    assert_close(returns, case.outputs.returns)
    assert_close(masked_whiten(advantages, ~case.outputs.padding_mask), case.outputs.advantages_whitened)


def test_lambda_one_is_the_sum_of_future_rewards_minus_the_value():
    rewards, values = random_case()
    advantages, returns = generalised_advantages(rewards, values, MASK, gamma=1.0, gae_lambda=1.0)
    expected = (rewards * MASK).flip(1).cumsum(1).flip(1)
    assert_close(advantages, (expected - values) * MASK)
    assert_close(returns, expected * MASK)


def test_lambda_zero_is_the_one_step_td_error():
    rewards, values = random_case()
    advantages, _ = generalised_advantages(rewards, values, MASK, gamma=0.9, gae_lambda=0.0)
    for row, length in enumerate(MASK.sum(1).tolist()):
        for t in range(length):
            next_value = values[row, t + 1] if t + 1 < length else 0.0
            assert_close(advantages[row, t], rewards[row, t] + 0.9 * next_value - values[row, t])
    assert not advantages[~MASK].any()


def test_definition_as_a_double_sum():
    rewards, values = random_case()
    advantages, returns = generalised_advantages(rewards, values, MASK, gamma=0.95, gae_lambda=0.8)
    for row, length in enumerate(MASK.sum(1).tolist()):
        after = [*values[row, 1:length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + 0.95 * after[t] - values[row, t].item() for t in range(length)]
        expected = [sum((0.95 * 0.8) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
        assert_close(advantages[row, :length], torch.tensor(expected))
        assert_close(returns[row, :length], torch.tensor(expected) + values[row, :length])


def test_last_values_bootstrap_truncated_responses():
    """Same as a last reward increased by the discounted value."""
    rewards, values = random_case()
    last = torch.tensor([0.7, 0.0, -1.3])
    advantages, returns = generalised_advantages(rewards, values, MASK, 0.9, 0.8, last)
    increased = rewards.clone()
    increased[torch.arange(3), MASK.sum(1) - 1] += 0.9 * last
    expected, _ = generalised_advantages(increased, values, MASK, 0.9, 0.8)
    assert_close(advantages, expected)
    assert_close(returns, (expected + values) * MASK)


def test_a_lambda_per_response():
    """Each row has the advantages that it has with its lambda alone."""
    rewards, values = random_case()
    lambdas = [0.9, 0.0, 0.4]
    together = generalised_advantages(rewards, values, MASK, 0.95, torch.tensor(lambdas))
    for row, gae_lambda in enumerate(lambdas):
        alone = generalised_advantages(rewards, values, MASK, 0.95, gae_lambda)
        assert_close([part[row] for part in together], [part[row] for part in alone])


def test_length_adaptive_lambda_by_hand():
    """VAPO: 1 - 1 / (0.05 * 200) = 0.9; all weights sum to alpha * length."""
    lambdas = length_adaptive_lambda(torch.tensor([200, 1000, 20, 3]), 0.05)
    assert_close(lambdas, torch.tensor([0.9, 0.98, 0.0, 0.0]))
    sums = [sum(gae_lambda**power for power in range(5000)) for gae_lambda in lambdas.tolist()]
    assert sums == pytest.approx([0.05 * 200, 0.05 * 1000, 1.0, 1.0], rel=1e-4)


def test_leave_one_out_matches_the_reference(reference):
    case = reference("rloo.advantages.default")
    advantages = leave_one_out_advantages(case.outputs.total_rewards, case.params.num_generations)
    assert_close(advantages, case.outputs.advantages)


def test_reinforce_is_the_return_minus_the_baseline():
    rewards, _ = random_case()
    advantages = reinforce_advantages(rewards, MASK, gamma=0.9, baseline=0.25)
    for row, length in enumerate(MASK.sum(1).tolist()):
        for t in range(length):
            expected = sum(0.9 ** (k - t) * rewards[row, k].item() for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected - 0.25, rel=1e-5)
    assert not advantages[~MASK].any()
    assert_close(discounted_sums(rewards * MASK, 0.9)[:, 0] - 0.25, advantages[:, 0])


def test_reinforce_pp_whitens_over_all_tokens():
    rewards, _ = random_case()
    advantages = whitened_returns(rewards, MASK, gamma=1.0)
    returns = (rewards * MASK).double().flip(1).cumsum(1).flip(1)[MASK].numpy()
    expected = (returns - returns.mean()) / returns.std(ddof=1)
    assert_close(advantages[MASK].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", [0.1, 9.7, 1000.1])
@pytest.mark.parametrize("size", [3, 7, 8])
def test_equal_rewards_have_no_advantage(score, size):
    """Rounding of their mean is not scaled up to an advantage."""
    totals = torch.full((2 * size,), score)
    assert not leave_one_out_advantages(totals, size).any()
    assert not group_advantages(totals, size, scale=True).any()
    last = torch.zeros(2 * size, 5)
    last[:, -1] = score
    assert not whitened_returns(last, torch.ones_like(last, dtype=torch.bool), gamma=1.0).any()


def test_groups_by_hand():
    totals = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    assert group_advantages(totals, 3, scale=False).tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert_close(group_advantages(totals, 3, scale=True), torch.tensor([-1.0, 0, 1, 0, 0, 0]) / 1.0001)

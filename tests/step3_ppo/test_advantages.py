"""Generalised advantage estimation, against another implementation and closed forms."""

import pytest
import torch

from common.tensor_ops import masked_whiten
from step3_ppo.advantages import generalised_advantages
from tests.conftest import assert_close

MASK = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]


def random_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and values, with garbage where the mask is false."""
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
    to_come = (rewards * MASK).flip(1).cumsum(1).flip(1)
    assert_close(advantages, (to_come - values) * MASK)
    assert_close(returns, to_come * MASK)


def test_lambda_zero_is_the_one_step_error():
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

"""The losses of ILQL, token by token, against the equations written with loops and against torch."""

import math

import pytest
import torch

from step2_reward.ilql.loss import awac_loss, cql_loss, expectile_loss, next_values, td_loss
from tests.conftest import assert_close


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_values_of_the_next_states_end_with_each_response() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    is_last = torch.tensor([False, True, True, False, True])
    assert next_values(values, is_last).tolist() == [2.0, 0.0, 0.0, 5.0, 0.0]


def test_temporal_difference_by_hand() -> None:
    """(3 - (1 + 0.5 x 2))^2, and only Q gets a gradient."""
    q, values = torch.tensor([3.0, 0.0], requires_grad=True), torch.tensor([2.0, 7.0], requires_grad=True)
    losses = td_loss(q, torch.tensor([1.0, -1.5]), values * torch.tensor([1.0, 0.0]), gamma=0.5)
    assert losses.tolist() == [1.0, 2.25]
    losses.sum().backward()
    assert q.grad.tolist() == [2.0, 3.0] and values.grad is None


def test_expectile_loss_is_minimal_at_the_expectile() -> None:
    """At 0.5 half of the squared error; the minimum balances the weighted distances of both sides."""
    q, value = numbers(200), torch.tensor(0.3)
    assert_close(expectile_loss(value.expand(200), q, 0.5), 0.5 * (q - 0.3) ** 2)
    for tau in (0.7, 0.9):
        value = torch.zeros(1, requires_grad=True)
        optimiser = torch.optim.LBFGS([value], max_iter=200, tolerance_grad=1e-9)

        def closure(optimiser=optimiser, value=value, tau=tau) -> torch.Tensor:
            optimiser.zero_grad()
            loss = expectile_loss(value.expand(200), q, tau).mean()
            loss.backward()
            return loss

        optimiser.step(closure)
        above, below = (q - value).clamp(min=0).sum(), (value - q).clamp(min=0).sum()
        assert_close(tau * above, (1 - tau) * below, rtol=1e-4, atol=1e-4)
        assert value.item() > q.mean().item()


def test_expectile_of_a_target_without_gradient() -> None:
    q, values = numbers(5, seed=1).requires_grad_(), numbers(5, seed=2).requires_grad_()
    expectile_loss(values, q, 0.8).sum().backward()
    slopes = [
        -2 * (0.8 if a >= b else 0.2) * (a - b) for a, b in zip(q.tolist(), values.tolist(), strict=True)
    ]
    assert_close(values.grad, torch.tensor(slopes))
    assert q.grad is None


def test_cql_is_the_cross_entropy_under_q() -> None:
    q, actions = numbers(20, 7) * 3, torch.arange(20) % 7
    expected = torch.nn.CrossEntropyLoss(reduction="none")(q, actions)
    assert_close(cql_loss(q[torch.arange(20), actions], q.logsumexp(1)), expected)


def test_awac_weighs_by_the_advantage() -> None:
    """With beta 0 plain cross-entropy; with beta ln 2 an advantage of 1 counts twice, -1 half."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.0, 0.0, -1.0], requires_grad=True)
    assert awac_loss(logprobs, advantages, 0.0).tolist() == [1.0, 2.0, 3.0]
    losses = awac_loss(logprobs, advantages, math.log(2))
    assert_close(losses.detach(), torch.tensor([2.0, 2.0, 1.5]))
    losses.sum().backward()
    assert advantages.grad is None
    assert awac_loss(logprobs, 1e3 * advantages, 100.0).tolist() == pytest.approx([math.exp(20), 2.0, 0.0])

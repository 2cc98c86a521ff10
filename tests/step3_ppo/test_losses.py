"""The losses of PPO and their gradients, compared with another implementation and closed forms."""

import math

import pytest
import torch

from common.numeric.tensor_ops import masked_mean
from step3_ppo.losses import (
    LOG_RATIO_LIMIT,
    clipped_weight_loss,
    kl_loss,
    policy_loss,
    token_weights,
    value_loss,
)
from step3_ppo.rewards import token_kl
from tests.conftest import assert_close


def test_policy_loss_matches_the_reference(reference):
    case = reference("ppo.loss.default")
    mask, logprobs = ~case.inputs.padding_mask, case.inputs.new_logprobs.requires_grad_()
    result = policy_loss(
        logprobs, case.inputs.old_logprobs_masked, case.inputs.advantages, case.params.cliprange.item()
    )
    loss = masked_mean(result.loss, mask)
    loss.backward()
    assert_close(loss, case.outputs.pg_loss)
    assert_close(masked_mean(result.clipped.float(), mask), case.outputs.pg_clipfrac)
    assert_close(logprobs.grad, case.outputs.grad_new_logprobs)
    # The reference averages the ratio over padding too, where it is 1.
    assert_close(torch.where(mask, result.ratio, 1.0).mean(), case.outputs.ratio_mean)


def test_value_loss_matches_the_reference(reference):
    case = reference("ppo.loss.default")
    mask, values = ~case.inputs.padding_mask_p1, case.inputs.vpred.requires_grad_()
    result = value_loss(
        values, case.inputs.old_values_masked, case.inputs.returns, case.params.cliprange_value.item()
    )
    loss = masked_mean(result.loss, mask)
    (case.params.vf_coef * loss).backward()
    assert_close(loss, case.outputs.vf_loss)
    assert_close(masked_mean(result.clipped.float(), mask), case.outputs.vf_clipfrac)
    assert_close(values.grad, case.outputs.grad_vpred)
    assert_close(case.outputs.pg_loss + case.params.vf_coef * loss, case.outputs.loss)


def test_first_update_has_ratio_one_and_the_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    result = policy_loss(logprobs, logprobs.detach(), advantages, clip_range=0.2, dual_clip=3.0)
    result.loss.sum().backward()
    assert torch.equal(result.ratio, torch.ones(3)) and not result.clipped.any()
    assert_close(logprobs.grad, -advantages)


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (2.0, -1.0, 2.0, 2.0),  # below the bound: the plain surrogate
        (5.0, -1.0, 3.0, 0.0),  # beyond it: -c A, and no gradient
        (5.0, 1.0, -1.2, 0.0),  # positive advantage: the ordinary clip
        (0.5, -1.0, 0.8, 0.0),
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_dual_clip_bounds_the_loss_of_negative_advantages(ratio, advantage, loss, gradient):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    result = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), clip_range=0.2, dual_clip=3.0)
    result.loss.backward()
    assert_close(result.loss, torch.tensor([loss]))
    assert_close(logprobs.grad, torch.tensor([gradient]))


def test_without_dual_clip_the_loss_is_not_bounded():
    result = policy_loss(torch.tensor([math.log(5.0)]), torch.zeros(1), torch.tensor([-1.0]), 0.2)
    assert_close(result.loss, torch.tensor([5.0]))


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (1.25, 1.0, -1.25, -1.25),  # beyond 1 + low, within 1 + high
        (1.5, 1.0, -1.3, 0.0),
        (0.75, -1.0, 0.8, 0.0),  # below 1 - low
        (0.75, 1.0, -0.75, -0.75),
    ],
)
def test_clip_higher_moves_the_upper_bound_alone(ratio, advantage, loss, gradient):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    result = policy_loss(
        logprobs, torch.zeros(1), torch.tensor([advantage]), clip_range=0.2, clip_range_high=0.3
    )
    result.loss.backward()
    assert_close(result.loss, torch.tensor([loss]))
    assert_close(logprobs.grad, torch.tensor([gradient]))
    assert result.clipped.item() is (gradient == 0.0)


def test_gspo_is_the_clipped_surrogate_of_whole_responses():
    """Loss and gradient of a mean over responses, each with one ratio and one advantage."""
    old, lengths = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0, -1.0]), [3, 1, 2]
    logprobs = torch.tensor([-0.8, -2.1, -0.6, -2.5, -1.1, -0.6], requires_grad=True)
    advantages = [0.5, 2.0, -1.5]  # the second response is beyond 1 + high
    per_token = torch.tensor(advantages).repeat_interleave(torch.tensor(lengths))
    result = policy_loss(logprobs, old, per_token, 0.1, clip_range_high=0.3, lengths=lengths)
    sum(part.mean() for part in result.loss.split(lengths)).backward()
    exact = logprobs.detach().clone().requires_grad_()
    expected = []
    for part, before, advantage in zip(exact.split(lengths), old.split(lengths), advantages, strict=True):
        ratio = (part.sum() - before.sum()).div(len(part)).exp()
        expected.append(-torch.minimum(ratio * advantage, ratio.clip(0.9, 1.3) * advantage))
    sum(expected).backward()
    assert_close(result.loss, torch.stack(expected).repeat_interleave(torch.tensor(lengths)))
    assert_close(logprobs.grad, exact.grad)
    assert result.clipped.tolist() == [False] * 3 + [True] + [False] * 2 and exact.grad[3] == 0


def test_gspo_of_responses_of_one_token_is_ppo():
    logprobs, old, advantages = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    result = policy_loss(logprobs, old, advantages, 0.2, 3.0, lengths=[1] * 5)
    assert_close(result, policy_loss(logprobs, old, advantages, 0.2, 3.0))


@pytest.mark.parametrize(
    "ratio, advantage, weight",
    [(1.0, 1.0, 1.0), (1.5, 1.0, 1.3), (1.5, -1.0, 1.3), (0.5, 2.0, 0.8), (0.9, -1.0, 0.9)],
)
def test_cispo_has_the_gradient_of_the_weighted_logprob(ratio, advantage, weight):
    """Both clipped signs keep their gradient, which the clipped surrogate takes from them."""
    logprobs = torch.tensor([-2.0], requires_grad=True)
    old = torch.tensor([-2.0 - math.log(ratio)])
    result = clipped_weight_loss(logprobs, old, torch.tensor([advantage]), 0.2, 0.3)
    result.loss.backward()
    assert_close(logprobs.grad, torch.tensor([-weight * advantage]))
    assert_close(result.loss, torch.tensor([2.0 * weight * advantage]))
    assert result.clipped.item() is (weight != ratio)


def test_cispo_without_a_lower_bound():
    result = clipped_weight_loss(torch.tensor([-3.0]), torch.zeros(1), torch.ones(1), 1.0, 4.0)
    assert_close(result.loss, torch.tensor([3.0 * math.exp(-3.0)]))
    assert not result.clipped


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("token", (1 + 2 + 3 + 10) / 4),
        ("sequence", ((1 + 2 + 3) / 3 + 10) / 2),
        ("constant", ((1 + 2 + 3) / 8 + 10 / 8) / 2),
    ],
)
def test_aggregation_by_hand(aggregation, expected):
    """Three tokens, two that are left out, one; at most eight."""
    losses, lengths = torch.tensor([1.0, 2.0, 3.0, 50.0, 60.0, 10.0]), torch.tensor([3, 2, 1])
    weights = token_weights(lengths, torch.tensor([True, False, True]), aggregation, 8)
    assert_close((weights.repeat_interleave(lengths) * losses).mean(), torch.tensor(expected))


def test_weights_without_and_with_all_responses():
    lengths, none = torch.tensor([3, 2, 1]), torch.zeros(3, dtype=torch.bool)
    for aggregation in ("token", "sequence", "constant"):
        assert not token_weights(lengths, none, aggregation, 8).any()
    assert torch.equal(token_weights(lengths, ~none, "token", 8), torch.ones(3))  # to the bit


def test_extreme_ratio_stays_finite():
    logprobs = torch.tensor([0.0, -500.0], requires_grad=True)
    result = policy_loss(logprobs, torch.tensor([-500.0, 0.0]), torch.tensor([-1.0, -1.0]), clip_range=0.2)
    result.loss.sum().backward()
    assert result.ratio.isfinite().all() and result.loss.isfinite().all() and logprobs.grad.isfinite().all()
    assert_close(result.ratio.log(), torch.tensor([LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT]))


def test_value_clip_closed_form():
    values, old, returns = torch.tensor([1.0, 0.1, 1.0]), torch.zeros(3), torch.tensor([0.0, 1.0, 2.0])
    result = value_loss(values, old, returns, clip_range=0.2)
    # First: the unclipped error is larger. Second: within the range. Third: clipped to 0.2, far from 2.
    assert_close(result.loss, torch.tensor([0.5, 0.5 * 0.9**2, 0.5 * 1.8**2]))
    assert result.clipped.tolist() == [False, False, True]


def test_values_within_the_range_are_not_clipped_by_rounding():
    values = torch.linspace(1e-3, 2e-3, 1001)
    old = values + torch.linspace(-0.15, 0.15, 1001)
    for target in (0.0, 3e-3):
        returns = torch.full_like(values, target)
        assert not value_loss(values, old, returns, clip_range=0.2).clipped.any()


def test_kl_losses_match_the_exact_kl():
    """In expectation over a distribution: k2 has the gradient of the KL divergence, k3 its value."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.tensor([0.1, 0.5, -0.7, 1.0], dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    exact = torch.nn.functional.kl_div(ref_logprobs, logprobs, reduction="sum", log_target=True)
    weights = logprobs.detach().exp()
    k2, k3 = (kl_loss(logprobs, ref_logprobs, name) for name in ("k2", "k3"))
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    assert_close(torch.autograd.grad((weights * k2).sum(), logits, retain_graph=True)[0], expected)
    assert_close((weights * k3).sum(), exact)
    assert (k3 > 0).all() and torch.equal(k2, 0.5 * (logprobs - ref_logprobs) ** 2)


def test_where_the_kl_estimators_are_unbiased():
    """In expectation over the policy: k1 and k3 have the value of KL(pi, ref), k2 its gradient.

    As a loss, k1 has no gradient and k3 that of KL(ref, pi); k1 in the reward has that of KL(pi, ref).
    """
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    logprobs, ref_logprobs = (
        logits.log_softmax(0),
        torch.tensor([0.1, 0.5, -0.7, 1.0]).double().log_softmax(0),
    )
    weights, mask = logprobs.detach().exp(), torch.ones(1, 4, dtype=torch.bool)
    k1 = token_kl(logprobs[None], ref_logprobs[None], mask)[0]
    k2, k3 = (kl_loss(logprobs, ref_logprobs, name) for name in ("k2", "k3"))
    forward = (weights * (logprobs - ref_logprobs)).sum().detach()
    assert_close([(weights * value).sum() for value in (k1, k3)], [forward, forward])
    assert not torch.isclose((weights * k2).sum(), forward, rtol=0.05)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    exact = gradient((logprobs.exp() * (logprobs - ref_logprobs)).sum())
    reverse = gradient((ref_logprobs.exp() * (ref_logprobs - logprobs)).sum())
    as_loss = [gradient((weights * value).sum()) for value in (k1, k2, k3)]
    assert_close(as_loss, [torch.zeros(4, dtype=torch.float64), exact, reverse])
    assert_close(gradient((weights * k1.detach() * logprobs).sum()), exact)  # the policy gradient of -reward


def test_kl_loss_of_an_extreme_token_is_finite():
    logprobs = torch.tensor([-800.0], requires_grad=True)
    loss = kl_loss(logprobs, torch.zeros(1), "k3")
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite()


def test_k3_of_an_extreme_token_does_not_pull_away_from_the_reference():
    """Never negative, and no gradient to even lower probabilities."""
    logprobs = torch.tensor([-19.0, -21.0, -1e4, -1e30], requires_grad=True)
    loss = kl_loss(logprobs, torch.zeros(4), "k3")
    loss.sum().backward()
    bounds = logprobs.detach().double().clamp(min=-LOG_RATIO_LIMIT)
    assert_close(loss.double(), (-bounds).exp() - 1 + bounds, rtol=1e-6, atol=0.0)
    assert logprobs.grad[0] < 0 and logprobs.grad[1:].tolist() == [0.0, 0.0, 0.0]

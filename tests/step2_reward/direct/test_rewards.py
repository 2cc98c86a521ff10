"""Changes of rewards against closed forms: f-divergences, AlphaPO, LD-DPO, WPO."""

import math

import pytest
import torch

from step2_reward.direct.options import DirectOptions
from step2_reward.direct.pair_losses import compared_values
from step2_reward.direct.rewards import f_rewards, length_weighted_sums, power_rewards, wpo_weights
from tests.conftest import assert_close

# f'(t) by the definition of the divergence.
DERIVATIVES = {
    "reverse_kl": math.log,
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: math.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (t**-0.3 - 1) / -0.3,
}
RATIOS = [0.1, 0.9, 1.0, 3.0]


@pytest.mark.parametrize("divergence", DERIVATIVES)
def test_rewards_are_derivatives_of_the_divergence(divergence):
    rewards = f_rewards(torch.tensor(RATIOS).log(), divergence, 0.7)
    assert_close(rewards, torch.tensor([DERIVATIVES[divergence](t) for t in RATIOS]))


def test_alpha_runs_from_forward_to_reverse_kl():
    log_ratios = torch.tensor(RATIOS).log()
    for alpha, other in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        assert_close(f_rewards(log_ratios, "alpha_divergence", alpha), f_rewards(log_ratios, other, 0.5))


def test_power_rewards_stay_finite():
    log_values = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    rewards = power_rewards(log_values, -1.0)
    rewards.sum().backward()
    assert rewards.isfinite().all() and log_values.grad.isfinite().all()


@pytest.mark.parametrize(("loss", "length"), [("simpo", 4.0), ("cpo", 1.0)])
def test_alphapo_bends_the_log_probability_that_the_loss_compares(loss, length):
    options = DirectOptions(loss=loss, alphapo_alpha=0.25)
    logprobs = torch.tensor([-2.0, -8.0])
    values = compared_values(logprobs, torch.tensor([4.0, 4.0]), options)
    expected = [(1 - math.exp(x / length) ** -0.25) / 0.25 for x in (-2.0, -8.0)]
    assert_close(values, torch.tensor(expected))


def test_a_divergence_is_of_the_sum_and_the_mean_follows():
    options = DirectOptions(loss="sigmoid_norm", f_divergence="forward_kl")
    values = compared_values(torch.tensor([0.5]), torch.tensor([4.0]), options)
    assert_close(values, torch.tensor([(1 - math.exp(-0.5)) / 4]))


def test_tokens_beyond_the_shortest_response_weigh_alpha():
    logprobs = torch.tensor([[9.0, -1.0, -2.0, -4.0], [9.0, 9.0, -3.0, 9.0]])
    is_response = torch.tensor([[False, True, True, True], [False, False, True, False]])
    sums = length_weighted_sums(logprobs, is_response, torch.tensor([1, 1]), 0.25)
    assert_close(sums, torch.tensor([-1 - 0.25 * 6, -3.0]))


def test_wpo_weighs_by_probability_relative_to_what_the_policy_draws():
    """A uniform policy weighs 1; the mean is over the tokens of the response; there is no gradient."""
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]], requires_grad=True)
    chosen = torch.stack([p[0, 1], p[1, 0], p[0, 0]]).log()[None]
    entropy = -(p**2).sum(1).log()[[0, 1, 0]][None]
    is_response = torch.tensor([[True, True, False]])
    weights = wpo_weights(chosen, entropy, is_response)
    assert_close(weights, torch.tensor([math.sqrt(0.25 / 0.375)]))
    assert not weights.requires_grad

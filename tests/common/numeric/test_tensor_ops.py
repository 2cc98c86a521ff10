"""Log-probabilities, entropy and masked statistics, against another implementation and closed forms."""

import pytest
import torch

from common.numeric.tensor_ops import (
    collision_entropy,
    entropy,
    label_logprobs,
    masked_mean,
    masked_var,
    masked_whiten,
    scaled,
)
from tests.conftest import assert_close


def test_label_logprobs_and_entropy_match_the_reference(reference):
    case = reference("logprobs.selective_log_softmax")
    logits, labels = case.inputs.logits[:, :-1], case.inputs.input_ids[:, 1:]
    assert_close(label_logprobs(logits, labels), case.outputs.shifted_logprobs)
    assert_close(entropy(logits), case.outputs.shifted_entropy)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 11, generator=generator) * 3
    labels = torch.randint(11, (4, 5), generator=generator)
    exact = (logits.double() / temperature).log_softmax(-1)
    expected = exact.gather(-1, labels[..., None])[..., 0]
    assert_close(label_logprobs(logits, labels, temperature), expected.float())
    assert_close(entropy(logits, temperature), -(exact.exp() * exact).sum(-1).float())


def test_gradient_of_label_logprobs_is_one_hot_minus_softmax():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([0, 8, 3, 3, 5, 1])
    label_logprobs(logits, labels, 0.7).sum().backward()
    softmax = (logits.detach().double() / 0.7).softmax(-1)
    expected = (torch.nn.functional.one_hot(labels, 9) - softmax) / 0.7
    assert_close(logits.grad, expected.float())


def test_entropy_of_known_distributions():
    assert_close(entropy(torch.zeros(3, 8)), torch.full((3,), 8.0).log())
    assert_close(entropy(torch.tensor([[1000.0, 0.0, 0.0]])), torch.zeros(1))
    assert_close(collision_entropy(torch.zeros(3, 8), 2.0), torch.full((3,), 8.0).log())
    uneven = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert_close(collision_entropy(uneven), -torch.tensor([0.375]).log())


def test_half_precision_logits_are_computed_in_fp32():
    logits = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.bfloat16)
    logprobs = label_logprobs(logits, torch.tensor([0]))
    assert logprobs.dtype == torch.float32
    assert_close(logprobs, logits.double().log_softmax(-1)[:, 0].float())


def test_large_logits_stay_finite():
    logprobs = label_logprobs(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    assert_close(logprobs, torch.tensor([-2e4]))


def test_scaled_makes_no_copy_for_temperature_one():
    logits = torch.randn(2, 3)
    assert scaled(logits, 1.0) is logits


def test_masked_statistics_match_the_reference(reference):
    case = reference("ppo.masked_stats")
    values, mask, expected = case.inputs.values, case.inputs.mask, case.outputs
    assert_close(masked_mean(values, mask), expected.mean)
    assert_close(masked_mean(values, mask, dim=1), expected.mean_axis1)
    assert_close(masked_var(values, mask), expected.var_unbiased)
    assert_close(masked_var(values, mask, unbiased=False), expected.var_biased)
    # Outside the mask, the reference has other numbers, and ours are 0.
    assert_close(masked_whiten(values, mask), expected.whiten * mask)
    assert_close(masked_whiten(values, mask, shift_mean=False), expected.whiten_keep_mean * mask)


def test_masked_mean_of_an_empty_mask_is_zero():
    mask = torch.tensor([[False, False], [True, False]])
    assert masked_mean(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), mask, dim=1).tolist() == [0.0, 3.0]


def test_statistics_ignore_masked_entries():
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 4])[:, None]
    other = torch.where(mask, values, 1e6)
    for function in (masked_mean, masked_var, masked_whiten):
        assert torch.equal(function(values, mask), function(other, mask))

"""The SFT loss and its gradient: against a reference implementation and across splits of a batch."""

import pytest
import torch

from common.numeric.tensor_ops import label_logprobs
from step1_sft.loss import dft_loss, sft_loss, training_loss
from tests.conftest import assert_close


@pytest.mark.parametrize("name", ["sft.loss.nll", "sft.loss.nll.num_items_12"])
def test_loss_and_gradient_match_the_reference(reference, name):
    case = reference(name)
    logits = case.inputs.logits.requires_grad_()
    is_trained = case.inputs.labels != -100
    assert not is_trained[:, 0].any()
    positions = is_trained.roll(-1, dims=1)  # the state before a trained token predicts it
    num_tokens = case.params.num_items_in_batch or int(is_trained.sum())
    loss = sft_loss(label_logprobs(logits[positions], case.inputs.labels[is_trained]), num_tokens)
    loss.backward()
    assert_close(loss, case.outputs.loss)
    assert_close(logits.grad, case.outputs.grad_logits)


@pytest.mark.parametrize("sizes", [[12], [1, 11], [3, 4, 5]])
def test_shares_of_any_split_sum_to_the_mean_over_tokens(sizes):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, 7, generator=generator), torch.randint(7, (12,), generator=generator)
    parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
    total = sum(sft_loss(label_logprobs(a, b), num_tokens=12) for a, b in parts)
    assert_close(total, torch.nn.functional.cross_entropy(logits, labels))


def test_dft_weighs_a_token_by_its_probability_without_a_gradient():
    """-p log p of each token; the gradient is p times that of the likelihood."""
    p = torch.tensor([0.5, 0.1, 0.9])
    logprobs = p.log().requires_grad_()
    loss = dft_loss(logprobs, num_tokens=4)
    loss.backward()
    assert_close(loss, -(p * p.log()).sum() / 4)
    assert_close(logprobs.grad, -p / 4)
    assert_close(training_loss(logprobs, 4, "dft"), loss)
    assert_close(training_loss(logprobs, 4, "nll"), -p.log().sum() / 4)

"""Top-k and top-p: the allowed tokens, their lists, and the distribution over them."""

import pytest
import torch

from common.numeric.tensor_ops import entropy
from common.numeric.top_k_top_p import Support, by_row, is_allowed, restrict, support
from tests.conftest import assert_close

PROBABILITIES = torch.tensor([0.05, 0.5, 0.0, 0.3, 0.15])


@pytest.mark.parametrize(
    "top_k, top_p, expected",
    [
        (0, 0.4, [1]), (0, 0.5, [1]), (0, 0.6, [1, 3]), (0, 0.9, [1, 3, 4]), (0, 0.97, [0, 1, 3, 4]),
        (1, 1.0, [1]), (3, 1.0, [1, 3, 4]), (99, 1.0, [0, 1, 3, 4]), (2, 0.6, [1]), (2, 0.63, [1, 3]),
    ],
)  # fmt: skip
def test_the_smallest_set_that_reaches_top_p_of_the_top_k(top_k, top_p, expected):
    """The first of the two likeliest tokens has a share of 0.625 of them."""
    assert is_allowed(PROBABILITIES[None], top_k, top_p)[0].nonzero().flatten().tolist() == expected


def test_lists_hold_the_allowed_tokens_of_each_state():
    logits = torch.stack([PROBABILITIES, PROBABILITIES.flip(0)]).log()
    allowed = support(logits, 0, 0.9)
    assert allowed.sizes.tolist() == [3, 3] and allowed.ids.tolist() == [1, 3, 4, 0, 1, 3]
    assert allowed.ids.dtype == torch.int32 and allowed.states.tolist() == [0, 0, 0, 1, 1, 1]
    everything = support(logits, 0, 1.0)
    assert everything.sizes.tolist() == [0, 0] and not len(everything.ids)


def test_parts_hold_the_lists_of_their_states():
    allowed = Support(torch.tensor([2, 1, 3, 1]), torch.tensor([5, 6, 5, 1, 2, 3, 9]))
    parts = [(part.sizes.tolist(), part.ids.tolist()) for part in allowed.split(3)]
    assert parts == [([2, 1, 3], [5, 6, 5, 1, 2, 3]), ([1], [9])]
    everything = Support(torch.zeros(3).int(), torch.zeros(0).int()).split(2)
    assert [(len(part.sizes), len(part.ids)) for part in everything] == [(2, 0), (1, 0)]


def test_lists_of_steps_are_sorted_by_row():
    """Row 1 has left the batch after step 0; row 0 ended at step 1 and was drawn once more."""
    steps = [
        (torch.tensor([0, 1, 2]), Support(torch.tensor([1, 2, 1]), torch.tensor([10, 11, 12, 13]))),
        (torch.tensor([0, 2]), Support(torch.tensor([2, 1]), torch.tensor([20, 21, 22]))),
        (torch.tensor([0, 2]), Support(torch.tensor([1, 2]), torch.tensor([30, 31, 32]))),
    ]
    assert by_row(steps, torch.tensor([2, 1, 3])).tolist() == [10, 20, 21, 11, 12, 13, 22, 31, 32]


def test_restricted_softmax_is_that_of_the_allowed_tokens():
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    allowed = Support(torch.full((4,), 3), torch.tensor([2, 3, 7] * 4))
    for temperature in (1.0, 0.1):
        restricted = restrict(logits, allowed)
        expected = torch.distributions.Categorical(logits=logits[:, [2, 3, 7]] / temperature)
        assert_close((restricted / temperature).softmax(-1)[:, [2, 3, 7]], expected.probs)
        assert_close(entropy(restricted, temperature), expected.entropy())
        (gradient,) = torch.autograd.grad(entropy(restricted, temperature).sum(), logits)
        (expected_gradient,) = torch.autograd.grad(expected.entropy().sum(), logits)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)
    assert restrict(logits, support(logits, 0, 1.0)) is logits

"""Top-k and top-p masks, and their packed form."""

import pytest
import torch

from common.numeric.tensor_ops import entropy
from common.numeric.top_k_top_p import pack, restrict, support, unpack
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
    assert support(PROBABILITIES[None], top_k, top_p)[0].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("size", [1, 7, 8, 9, 40])
def test_unpack_is_the_inverse_of_pack(size):
    flags = torch.rand(3, 2, size, generator=torch.Generator().manual_seed(size)) < 0.5
    packed = pack(flags)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-size // 8))
    assert torch.equal(unpack(packed, size), flags)


def test_restricted_softmax_is_that_of_the_allowed_tokens():
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    flags = torch.zeros(4, 11, dtype=torch.bool)
    flags[:, [2, 3, 7]] = True
    for temperature in (1.0, 0.1):
        restricted = restrict(logits, pack(flags))
        expected = torch.distributions.Categorical(logits=logits[:, [2, 3, 7]] / temperature)
        assert_close((restricted / temperature).softmax(-1)[:, [2, 3, 7]], expected.probs)
        assert_close(entropy(restricted, temperature), expected.entropy())
        (gradient,) = torch.autograd.grad(entropy(restricted, temperature).sum(), logits)
        (expected_gradient,) = torch.autograd.grad(expected.entropy().sum(), logits)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)
    assert restrict(logits, torch.zeros(4, 0, dtype=torch.uint8)) is logits

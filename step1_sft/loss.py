"""The losses of supervised fine-tuning. Pure."""

from typing import assert_never

from torch import Tensor


def sft_loss(logprobs: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Negative log-likelihood of the trained tokens, as this micro-batch's share of the global token mean.

    logprobs (N,): of the N trained tokens.
    num_tokens: trained tokens of the global batch, over all ranks and accumulation steps. The shares then sum
    to the mean over tokens, however the batch is split.
    """
    return -logprobs.sum() / num_tokens


def dft_loss(logprobs: Tensor, num_tokens: Tensor | int) -> Tensor:
    """`sft_loss` in which each token weighs its own probability, a constant for the gradient.

    logprobs (N,), num_tokens: as in `sft_loss`. Source: Wu et al. 2025 (DFT).
    """
    return sft_loss(logprobs * logprobs.detach().exp(), num_tokens)


def training_loss(logprobs: Tensor, num_tokens: Tensor | int, token_loss: str) -> Tensor:
    """The loss of --token_loss; logprobs (N,), num_tokens: as in `sft_loss`."""
    match token_loss:
        case "nll":
            return sft_loss(logprobs, num_tokens)
        case "dft":
            return dft_loss(logprobs, num_tokens)
        case _:
            assert_never(token_loss)

"""The loss of supervised fine-tuning. Pure."""

from torch import Tensor


def sft_loss(logprobs: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Negative log-likelihood of the trained tokens, as this micro-batch's share of the global token mean.

    logprobs (N,): of the N trained tokens.
    num_tokens: trained tokens of the global batch, over all ranks and accumulation steps. The shares then sum
    to the mean over tokens, however the batch is split.
    """
    return -logprobs.sum() / num_tokens

"""The loss of supervised fine-tuning. Pure."""

from torch import Tensor

from common.numeric.tensor_ops import label_logprobs


def sft_loss(logits: Tensor, labels: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Negative log-likelihood of the trained tokens, as this micro-batch's share of the global token mean.

    logits (N, V): at the N positions that predict a trained token; labels (N,): those tokens.
    num_tokens: trained tokens of the global batch, over all ranks and accumulation steps. The shares then sum
    to the mean over tokens, however the batch is split.
    """
    return -label_logprobs(logits, labels).sum() / num_tokens

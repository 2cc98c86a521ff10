"""Operations on logits and masked tensors, shared by the stages. Pure: tensors in, tensors out."""

import torch
import torch.nn.functional as F
from torch import Tensor


def label_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the labels under softmax(logits / temperature), computed in fp32.

    logits (..., V), labels (...) of token ids -> (...) fp32.
    """
    logits = scaled(logits, temperature)
    # The fused kernel is three times as fast as gather and logsumexp, backward pass included.
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return -losses.view(labels.shape)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): logits (..., V) -> (...) fp32."""
    logprobs = scaled(logits, temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def collision_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-log sum_v p(v)^2 in nats, of p = softmax(logits / temperature): logits (..., V) -> (...) fp32."""
    return -(2 * scaled(logits, temperature).log_softmax(-1)).logsumexp(-1)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in fp32. Makes no copy for fp32 logits and temperature 1."""
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is true, over all entries or along `dim`; 0 for an empty mask."""
    mask = mask.to(values.dtype)
    total, count = (values * mask).sum(dim), mask.sum(dim)
    return total / count.clamp(min=1.0)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance where `mask` is true; `unbiased` divides by n - 1 (Bessel) and needs two entries."""
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    count = mask.sum()
    return variance * count / (count - 1).clamp(min=1) if unbiased else variance


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Whiten the entries where `mask` is true: variance 1, and mean 0 with `shift_mean`. Others become 0.

    The variance divides by n - 1. Source: Ziegler et al. 2019 (lm-human-preferences, `whiten`), here with a
    mask for padded responses.
    """
    # In double the mean of equal values is exact; else its rounding would be scaled up, by as much as 1e4.
    mean = masked_mean(values.double(), mask).to(values.dtype)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask.to(values.dtype)

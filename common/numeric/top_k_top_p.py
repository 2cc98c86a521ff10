"""Top-k and top-p sampling: masks of the allowed tokens, packed into bits for the rollout. Pure."""

import torch
from torch import Tensor
from torch.nn.functional import pad

OUTSIDE = -1e30  # logit of an excluded token; finite, so that 0 x log-probability is 0


def support(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Mask of the allowed tokens: the top_k likeliest (0: all), and the likeliest of these that reach top_p.

    probabilities (..., V) -> (..., V) bool. Source: Holtzman et al. 2020, section 3.1; Fan et al. 2018.
    """
    ordered, order = probabilities.sort(-1, descending=True)
    if top_k:
        ordered = ordered[..., :top_k]
        order = order[..., :top_k]
    sums = ordered.cumsum(-1)
    is_within = sums - ordered < top_p * sums[..., -1:]
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, is_within)


def restrict(logits: Tensor, packed: Tensor) -> Tensor:
    """Mask excluded tokens, so that the softmax is the sampling distribution: (N, V) -> (N, V) fp32.

    packed: `pack` of the support, (N, V / 8); (N, 0) if all tokens are allowed.
    """
    if not packed.shape[-1]:
        return logits
    return logits.float().masked_fill(~unpack(packed, logits.shape[-1]), OUTSIDE)


def pack(flags: Tensor) -> Tensor:
    """Pack eight flags per byte: (..., V) bool -> (..., V / 8, rounded up) uint8."""
    bits = pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))  # (..., V / 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, size: int) -> Tensor:
    """Inverse of `pack`: (..., size / 8) uint8 -> (..., size) bool."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().flatten(-2)[..., :size]

"""Which tokens may be drawn, when --top_k or --top_p leaves some out; as bits, to be remembered. Pure."""

import torch
from torch import Tensor
from torch.nn.functional import pad

OUTSIDE = -1e30  # a logit without probability; finite, so that 0 times its logarithm is 0


def support(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """True on the top_k likeliest tokens (0: all), and of these on the likeliest whose shares reach top_p.

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
    """Logits (N, V) whose softmax is that of the drawn distribution: fp32, without what was left out.

    packed: `pack` of the support, (N, V / 8); with no columns nothing was left out.
    """
    if not packed.shape[-1]:
        return logits
    return logits.float().masked_fill(~unpack(packed, logits.shape[-1]), OUTSIDE)


def pack(flags: Tensor) -> Tensor:
    """Eight flags to a byte: (..., V) bool -> (..., V / 8, rounded up) uint8."""
    bits = pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))  # (..., V / 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, size: int) -> Tensor:
    """What `pack` was given: (..., size / 8) uint8 -> (..., size) bool."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().flatten(-2)[..., :size]

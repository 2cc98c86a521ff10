"""Bytes of weights, optimiser state, gradients and buffers. Pure arithmetic.

The counts follow the operations of DeepSpeed 0.19 and transformers 5. Published formulas are cited.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

Parts = Counter[str]  # bytes by part; "host" is in host memory

FP32 = 4
MOMENTS = 2 * FP32  # of AdamW
ALLREDUCE_BUCKET = 500_000_000  # elements per reduction at stage 0, and DeepSpeed's default


@dataclass(frozen=True)
class Shape:
    """A decoder: numbers of parameters, and widths of one layer."""

    parameters: int  # tied weights count once
    trained: int  # all parameters, or adapters
    largest: int  # largest tensor
    layers: int
    hidden: int
    heads: int
    queries: int  # heads x head size
    keys: int  # key-value heads x head size
    mlp: int
    saved_in_mlp: int  # tensors of the MLP's width saved for the backward pass
    norms: int  # of the residual stream, per layer
    head_norms: int  # total width of the norms of queries and keys
    vocabulary: int
    has_rms_norm: bool
    has_eager_attention: bool = False
    tensors: tuple[int, ...] = ()  # their numbers of parameters
    in_4bit: int = 0  # parameters in 4 bits
    bytes_of_4bit: int = 0  # these, with their scales
    largest_in_4bit: int = 0  # parameters of the largest matrix among them


@dataclass(frozen=True)
class Zero:
    """ZeRO settings of a model, from the JSON, and the number of ranks."""

    stage: int
    ranks: int
    size: int = 2  # bytes per weight; 4 in fp32
    offloads_optimiser: bool = False
    offloads_weights: bool = False
    bucket: int = ALLREDUCE_BUCKET  # elements of a reduction buffer
    buffers: int = 1  # number of reduction buffers
    live: int = 1_000_000_000  # most parameters gathered at once at stage 3
    sub_group: int = 1_000_000_000  # parameters that a rank updates at once at stage 3
    all_reduces: bool = True  # stages 1 and 2: gradients are summed on all ranks, not on their owner alone
    hpz: int = 1  # ranks that share a second copy of the weights at stage 3 (ZeRO++); 1: no copy
    sums_in_fp32: bool = False  # gradients of many micro-batches
    on_cpu: bool = False

    @property
    def parts_of_weights(self) -> int:
        return self.ranks if self.stage == 3 else 1

    @property
    def parts_of_gradients(self) -> int:
        return self.ranks if self.stage >= 2 else 1

    @property
    def parts_of_optimiser(self) -> int:
        return self.ranks if self.stage >= 1 else 1


class Model(NamedTuple):
    """Shape and ZeRO settings of a model."""

    shape: Shape
    zero: Zero


def pinned(size: float) -> float:
    """Host memory of a pinned tensor: PyTorch rounds up to powers of two."""
    return 2.0 ** math.ceil(math.log2(size)) if size else 0.0


def weights(model: Model) -> Parts:
    """In 16 bits 2P, and 2P / N on N ranks at stage 3 (Rajbhandari et al. 2020, ZeRO, figure 1).

    With hpZ of K ranks, another 2P / K (Wang et al. 2023, ZeRO++, section 3.2). In 4 bits, below stage 3:
    `nf4_bytes`.
    """
    shape, zero = model
    size = shape.bytes_of_4bit + zero.size * (shape.parameters - shape.in_4bit) / zero.parts_of_weights
    if zero.stage == 3 and zero.hpz > 1:
        size += zero.size * shape.parameters / zero.hpz
    if not zero.offloads_weights or zero.on_cpu:
        return Parts(weights=size)
    return Parts(host=_pinned_parts(model) if zero.stage == 3 else size)


def _pinned_parts(model: Model) -> float:
    """Stage 3 pins this rank's part of each tensor. Those of a trained model then move to one buffer, but
    PyTorch keeps what was pinned for later.
    """
    shape, zero = model
    parts = sum(pinned(zero.size * tensor / zero.ranks) for tensor in shape.tensors or [shape.parameters])
    return parts + pinned(zero.size * shape.trained / zero.ranks)


def optimiser(model: Model) -> Parts:
    """Two moments in fp32, and an fp32 copy of the weights: 12P in 16 bits, 12P / N from stage 1 on (ZeRO,
    figure 1). Stage 0 in fp32 needs no copy: it updates the weights in place.

    Offload also keeps on the host fp32 gradients, 16-bit gradients to accumulate, and below stage 3 a 16-bit
    copy of the weights. All is pinned but the moments, and at stage 3 the fp32 weights.
    """
    shape, zero = model
    share = shape.trained / zero.parts_of_optimiser
    if not zero.offloads_optimiser:
        has_copy = zero.size < FP32 or zero.stage > 0
        return Parts(optimiser=(MOMENTS + FP32 * has_copy) * share)
    if zero.on_cpu:
        return Parts(optimiser=(MOMENTS + FP32 + FP32 + zero.size) * share)
    copies = FP32 * share if zero.stage == 3 else pinned(FP32 * share) + pinned(zero.size * share)
    return Parts(host=MOMENTS * share + copies + pinned(FP32 * share) + pinned(zero.size * share))


def optimiser_away(model: Model) -> float:
    """Pinned host memory of states between updates, with --offload_states."""
    size = FP32 * model.shape.trained / model.zero.parts_of_optimiser
    return 3 * pinned(size)


def gradients(model: Model) -> Parts:
    """In the precision of the weights: 2P in 16 bits, 2P / N from stage 2 on (ZeRO, figure 1); or in fp32."""
    shape, zero = model
    if zero.offloads_optimiser and zero.stage >= 2:
        return Parts()
    size = FP32 if zero.sums_in_fp32 else zero.size
    return Parts(gradients=size * shape.trained / zero.parts_of_gradients)


def copies_in_step(model: Model) -> float:
    """Temporary copies of this rank's gradients in an optimiser step: a flat tensor, and the same in fp32.
    Sums in fp32 are in one, at stage 2 in a flat tensor already.

    Stage 3 updates one sub-group of tensors after the other; the last tensor may exceed its size.
    """
    shape, zero = model
    if zero.stage == 0 or zero.offloads_optimiser:
        return 0.0
    share = shape.trained / zero.parts_of_optimiser
    if zero.stage == 3:
        share = min(share, zero.sub_group + shape.largest / zero.ranks)
    if zero.sums_in_fp32:
        return FP32 * share * (zero.stage == 3)
    return (zero.size + FP32 * (zero.size < FP32)) * share


def buffers_of_reduction(model: Model) -> float:
    """Reduction buffers of gradients, at the moment when they need most beside this rank's gradients.

    A GPU allocates complete buckets, the CPU only the pages that are written. Stages 1 and 2 add a flat copy
    of one bucket; if there is a single bucket, its gradients replace the copy. At stage 1 the gradients move
    into the buckets.
    """
    shape, zero = model
    used = min(shape.trained, zero.bucket)
    if zero.stage == 0:
        return zero.size * used * (zero.ranks > 1)
    if zero.stage == 3:
        return zero.size * (zero.bucket + max(zero.bucket, shape.largest))
    replaced = used / zero.ranks if zero.stage == 2 and used == shape.trained else 0
    reserved = used * (zero.stage == 2) if zero.on_cpu else zero.bucket * zero.buffers
    return zero.size * (reserved + used - replaced)


def gathered(model: Model) -> float:
    """Weights fetched while a model runs: at stage 3 from other ranks; below it, all weights of an offloaded
    frozen model.

    After a pass with gradients, stage 3 keeps weights for the next backward pass. Otherwise it would free
    each matrix after use.
    """
    shape, zero = model
    if zero.stage < 3:
        return zero.size * shape.parameters * (zero.offloads_weights and not zero.on_cpu)
    if zero.ranks == 1 and not zero.offloads_weights:
        return 0.0
    return zero.size * min(shape.parameters, zero.live)


def present(model: Model) -> float:
    """Weights in training precision while a model runs: `gathered`, and a matrix dequantised from 4 bits."""
    return gathered(model) + model.zero.size * model.shape.largest_in_4bit


def nf4_bytes(parameters: int, is_double: bool) -> int:
    """Bytes of a matrix in 4 bits: two weights per byte and an fp32 scale per 64. Double quantisation: a byte
    per scale, an fp32 scale per 256 of these, and 257 constants. So 4.5 or 4.127 bits per weight (Dettmers et
    al. 2023, QLoRA, section 3).
    """
    scales = -(-parameters // 64)
    of_scales = scales + FP32 * (-(-scales // 256) + 257) if is_double else FP32 * scales
    return -(-parameters // 2) + of_scales


def total(parts: Parts) -> float:
    """Bytes on the device, without host memory."""
    return sum(size for part, size in parts.items() if part != "host")

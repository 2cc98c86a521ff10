"""Bytes that models, their training and their tensors take. Pure arithmetic.

What is counted follows from what DeepSpeed 0.19 and transformers 5 do, operation by operation; where there is
a published formula, it stands beside.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

Parts = Counter[str]  # bytes by part; "host" is what offload moves to host memory

FP32 = 4
MOMENTS = 2 * FP32  # of AdamW
ALLREDUCE_BUCKET = 500_000_000  # elements that DeepSpeed reduces at once at stage 0, and by default


@dataclass(frozen=True)
class Shape:
    """A decoder: its numbers of parameters, and the widths of one layer."""

    parameters: int  # tied ones once
    trained: int  # all of them, or adapters
    largest: int  # of one tensor
    layers: int
    hidden: int
    heads: int
    queries: int  # heads x head size
    keys: int  # key-value heads x head size
    mlp: int
    kept_in_mlp: int  # tensors of that width that gradients need
    norms: int  # of the residual stream, in a layer
    head_norms: int  # width of those of queries and keys together
    vocabulary: int
    has_rms_norm: bool
    has_eager_attention: bool = False


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed holds a model: what the JSON says, on so many ranks."""

    stage: int
    ranks: int
    size: int = 2  # bytes of a weight; 4 in fp32
    offloads_optimiser: bool = False
    offloads_weights: bool = False
    bucket: int = ALLREDUCE_BUCKET  # elements in a buffer of gradients on their way
    buffers: int = 1  # of that size
    live: int = 1_000_000_000  # parameters gathered at once at stage 3, at most
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
    """A model and how it is held."""

    shape: Shape
    zero: Zero


def weights(model: Model) -> Parts:
    """In 16 bits 2P, and 2P / N on N ranks at stage 3 (Rajbhandari et al. 2020, ZeRO, figure 1)."""
    shape, zero = model
    held = zero.size * shape.parameters / zero.parts_of_weights
    return Parts({"host" if zero.offloads_weights and not zero.on_cpu else "weights": held})


def optimiser(model: Model) -> Parts:
    """Two moments in fp32, and an fp32 copy of the weights: 12P in 16 bits, 12P / N from stage 1 on (ZeRO,
    figure 1). Only stage 0 updates weights that are in fp32 in place.

    Offload keeps fp32 gradients on the host besides, and at stage 2 a 16-bit copy of the weights.
    """
    shape, zero = model
    has_copy = zero.size < FP32 or zero.stage > 0
    each = MOMENTS + FP32 * has_copy
    if zero.offloads_optimiser:
        each += FP32 + zero.size
    part = "host" if zero.offloads_optimiser and not zero.on_cpu else "optimiser"
    return Parts({part: each * shape.trained / zero.parts_of_optimiser})


def gradients(model: Model) -> Parts:
    """In the precision of the weights: 2P in 16 bits, 2P / N from stage 2 on (ZeRO, figure 1)."""
    shape, zero = model
    if zero.offloads_optimiser and zero.stage >= 2:
        return Parts()
    return Parts(gradients=zero.size * shape.trained / zero.parts_of_gradients)


def copies_in_step(model: Model) -> float:
    """What an optimiser step makes from the gradients of this rank's part: one flat tensor of them, and that
    in fp32.
    """
    shape, zero = model
    if zero.stage == 0 or zero.offloads_optimiser:
        return 0.0
    return (zero.size + FP32 * (zero.size < FP32)) * shape.trained / zero.parts_of_optimiser


def buffers_of_reduction(model: Model) -> float:
    """What carries gradients between ranks, at its most beside all of this rank's own gradients.

    Buckets of which a GPU hands out whole ones, and the CPU those pages that are written; and at stages 1 and
    2 a flat copy of one bucket, in whose place come the gradients that are kept of a single bucket. At stage
    1 the gradients themselves move into the buckets.
    """
    shape, zero = model
    used = min(shape.trained, zero.bucket)
    if zero.stage == 0:
        return zero.size * used * (zero.ranks > 1)
    if zero.stage == 3:
        return zero.size * (zero.bucket + max(zero.bucket, shape.largest))
    kept = used / zero.ranks if zero.stage == 2 and used == shape.trained else 0
    reserved = used * (zero.stage == 2) if zero.on_cpu else zero.bucket * zero.buffers
    return zero.size * (reserved + used - kept)


def gathered(model: Model, is_known: bool = True) -> float:
    """Weights that have been fetched while a model runs: at stage 3 from other ranks, else all of a frozen
    model that waits in host memory.

    Stage 3 keeps what the backward pass will need if it knows the order of layers from a pass before;
    otherwise it gives back each matrix after use, and goes on so where the first pass was one without
    gradients, as when step 2 tries whether prompts can be shared.
    """
    shape, zero = model
    if zero.stage < 3:
        return zero.size * shape.parameters * (zero.offloads_weights and not zero.on_cpu)
    if zero.ranks == 1 and not zero.offloads_weights:
        return 0.0
    return zero.size * min(shape.parameters, zero.live if is_known else shape.largest)


def activations(model: Model, rows: int, width: int, checkpointing: bool = False) -> float:
    """What a forward pass over rows x width tokens keeps for the backward pass, but for the output head: all
    of each layer, or with checkpointing only what goes into it; and what the last norm keeps.
    """
    layer = rows * width * model.zero.size * model.shape.hidden
    if not checkpointing:
        layer = in_layer(model, rows, width)
    return model.shape.layers * layer + rows * width * _norm_and_output(model) * model.shape.hidden


def in_layer(model: Model, rows: int, width: int) -> float:
    """What one layer keeps for the backward pass.

    The count of Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
    section 4.1), who get 34 + 5 a s / h bytes per layer, token and unit of h, for layers as transformers
    runs them and without dropout: per token, with weights of e bytes, h = hidden,

    - 2 norms: LayerNorm keeps what goes in, e h; RMSNorm what goes in in fp32, and, where its scale is
      trained, what that scales, (4 + e) h; the matrices after it keep what comes out, e h, but for norms of
      queries and keys
    - attention: query and output, e x heads x head size each; key and value of the key-value heads; the
      logarithm of each head's sum. Eager attention keeps its probabilities instead, s x heads
    - MLP: e x its width, 4 times with a gate (gate, its activation, up, their product), 2 times without
    """
    shape, e = model.shape, model.zero.size
    attention = e * (2 * shape.queries + 2 * shape.keys) + FP32 * shape.heads
    if shape.has_eager_attention:
        attention += width * shape.heads * (FP32 + e * (e < FP32))
    layer = attention + e * shape.kept_in_mlp * shape.mlp
    layer += _norm_and_output(model) * shape.norms * shape.hidden
    return rows * width * (layer + (_norm_and_output(model) - e) * shape.head_norms)


def _norm_and_output(model: Model) -> int:
    """Bytes per element that a norm, and the matrices after it, keep."""
    shape, e = model.shape, model.zero.size
    if not shape.has_rms_norm:
        return e + e
    is_trained = shape.trained == shape.parameters
    return FP32 + e * is_trained + e


def passing(model: Model, rows: int, width: int) -> float:
    """Most that is alive within a layer in a pass without gradients: three tensors as wide as the MLP, and
    the residual stream before and after a norm.
    """
    shape, zero = model
    scores = 2 * FP32 * shape.heads * width if shape.has_eager_attention else 0
    return rows * width * (zero.size * (3 * shape.mlp + 2 * shape.hidden) + scores)


def logits(model: Model, positions: int) -> float:
    """At `positions` of a micro-batch, which stay until its update is made."""
    return positions * model.shape.vocabulary * model.zero.size


def gradient_of_logits(model: Model, positions: int) -> float:
    """While it is made: log-probabilities and their gradients before and after the softmax, in fp32."""
    return positions * model.shape.vocabulary * 3 * FP32


def logits_in_reading(model: Model, positions: int) -> float:
    """Without gradients: logits, the same in fp32, and log-probabilities."""
    e = model.zero.size
    return positions * model.shape.vocabulary * (e + FP32 * (e < FP32) + FP32)


def logits_in_drawing(model: Model, rows: int) -> float:
    """Of one token per row: logits, and in fp32 the same, scaled, log-probabilities, probabilities, their
    sums, and what they become for the argmax.
    """
    return rows * model.shape.vocabulary * (model.zero.size + 6 * FP32)


def drawable(model: Model, positions: int) -> float:
    """Which tokens top-k and top-p left over at each position of a rollout, a bit for each."""
    return positions * -(-model.shape.vocabulary // 8)


def kv_cache(model: Model, rows: int, width: int) -> float:
    """Keys and values of every layer and token, and one layer's twice while a token is added to it."""
    shape, zero = model
    return 2 * (shape.layers + 1) * rows * width * shape.keys * zero.size


def total(parts: Parts) -> float:
    """Of the device, without what is on the host."""
    return sum(size for part, size in parts.items() if part != "host")

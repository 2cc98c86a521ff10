"""Bytes of weights, optimiser state, gradients, buffers and activations. Pure arithmetic.

The counts follow the operations of DeepSpeed 0.19 and transformers 5. Published formulas are cited.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from common.model.head import CHUNK

Parts = Counter[str]  # bytes by part; "host" is offloaded to host memory

FP32 = INT32 = 4
MOMENTS = 2 * FP32  # of AdamW
ALLREDUCE_BUCKET = 500_000_000  # elements per reduction at stage 0, and DeepSpeed's default
NUCLEUS = 256  # tokens that top-p leaves on average: an assumption, high for a trained model


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


def weights(model: Model) -> Parts:
    """In 16 bits 2P, and 2P / N on N ranks at stage 3 (Rajbhandari et al. 2020, ZeRO, figure 1)."""
    shape, zero = model
    size = zero.size * shape.parameters / zero.parts_of_weights
    return Parts({"host" if zero.offloads_weights and not zero.on_cpu else "weights": size})


def optimiser(model: Model) -> Parts:
    """Two moments in fp32, and an fp32 copy of the weights: 12P in 16 bits, 12P / N from stage 1 on (ZeRO,
    figure 1). Stage 0 in fp32 needs no copy: it updates the weights in place.

    Offload also keeps fp32 gradients on the host, and at stage 2 a 16-bit copy of the weights.
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
    """Temporary copies of this rank's gradients in an optimiser step: a flat tensor, and the same in fp32."""
    shape, zero = model
    if zero.stage == 0 or zero.offloads_optimiser:
        return 0.0
    return (zero.size + FP32 * (zero.size < FP32)) * shape.trained / zero.parts_of_optimiser


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


def gathered(model: Model, is_traced: bool = True) -> float:
    """Weights fetched while a model runs: at stage 3 from other ranks; below it, all weights of an offloaded
    frozen model.

    With a trace of an earlier pass with gradients (is_traced), stage 3 keeps the weights for the backward
    pass. Without it, stage 3 frees each matrix after use: after a first pass without gradients, as when step
    2 tests whether prompts can be shared.
    """
    shape, zero = model
    if zero.stage < 3:
        return zero.size * shape.parameters * (zero.offloads_weights and not zero.on_cpu)
    if zero.ranks == 1 and not zero.offloads_weights:
        return 0.0
    return zero.size * min(shape.parameters, zero.live if is_traced else shape.largest)


def activations(model: Model, rows: int, width: int, checkpointing: bool = False) -> float:
    """Activations that a forward pass over rows x width tokens saves for the backward pass, without the
    output head: those of each layer, or with checkpointing only its input; and those of the last norm.
    """
    layer = rows * width * model.zero.size * model.shape.hidden
    if not checkpointing:
        layer = in_layer(model, rows, width)
    return model.shape.layers * layer + rows * width * _norm_and_output(model) * model.shape.hidden


def in_layer(model: Model, rows: int, width: int) -> float:
    """Activations that one layer saves for the backward pass.

    Counted as in Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
    section 4.1: 34 + 5 a s / h bytes per layer, token and unit of h), for the layers of transformers without
    dropout. Per token, with weights of e bytes and h = hidden:

    - 2 norms: LayerNorm saves its input, e h; RMSNorm its input in fp32 and, if its scale is trained, the
      normalised input, (4 + e) h. The matrices after a norm save its output, e h, except for norms of queries
      and keys.
    - attention: query and output, e x heads x head size each; key and value of the key-value heads; the
      log-sum-exp of each head. Eager attention also saves the probabilities, s x heads.
    - MLP: e x its width, 4 times with a gate (gate, its activation, up, their product), 2 times without.
    """
    shape, e = model.shape, model.zero.size
    attention = e * (2 * shape.queries + 2 * shape.keys) + FP32 * shape.heads
    if shape.has_eager_attention:
        attention += width * shape.heads * (FP32 + e * (e < FP32))
    layer = attention + e * shape.saved_in_mlp * shape.mlp
    layer += _norm_and_output(model) * shape.norms * shape.hidden
    return rows * width * (layer + (_norm_and_output(model) - e) * shape.head_norms)


def _norm_and_output(model: Model) -> int:
    """Bytes per element that a norm, and the matrices after it, save."""
    shape, e = model.shape, model.zero.size
    if not shape.has_rms_norm:
        return e + e
    is_trained = shape.trained == shape.parameters
    return FP32 + e * is_trained + e


def passing(model: Model, rows: int, width: int) -> float:
    """Peak activations of a layer in a pass without gradients: three tensors of the MLP's width, and the
    residual stream before and after a norm.
    """
    shape, zero = model
    scores = 2 * FP32 * shape.heads * width if shape.has_eager_attention else 0
    return rows * width * (zero.size * (3 * shape.mlp + 2 * shape.hidden) + scores)


def logits(model: Model, positions: int) -> float:
    """Logits at `positions` of a micro-batch, saved for the backward pass if they are a single chunk."""
    size = positions * model.shape.vocabulary
    return size * model.zero.size if size == _in_chunk(model, positions) else 0.0


def gradient_of_logits(model: Model, positions: int) -> float:
    """Peak of the loss's backward pass: log-probabilities and their gradients before and after softmax, in
    fp32. With several chunks, also the logits, the same in fp32, and the gradient of a trained head.
    """
    (shape, zero), size = model, _in_chunk(model, positions)
    if size == positions * shape.vocabulary:
        return size * 3 * FP32
    of_head = zero.size * shape.vocabulary * shape.hidden * (shape.trained == shape.parameters)
    return of_head + size * 5 * FP32


def logits_in_scoring(model: Model, positions: int) -> float:
    """Pass without gradients: logits of a chunk, the same in fp32, and log-probabilities."""
    e = model.zero.size
    return _in_chunk(model, positions) * (e + FP32 * (e < FP32) + FP32)


def logits_in_sampling(model: Model, rows: int) -> float:
    """Sampling of one token per row: logits; and in fp32 the same, scaled, log-probabilities, probabilities,
    their sums, and the operand of the argmax.
    """
    return rows * model.shape.vocabulary * (model.zero.size + 6 * FP32)


def _in_chunk(model: Model, positions: int) -> int:
    """Logits in memory at once, of all positions or of a chunk of them."""
    vocabulary = model.shape.vocabulary
    return min(positions * vocabulary, max(CHUNK, vocabulary))


def allowed_tokens(top_k: int, top_p: float, positions: int) -> float:
    """Lists of the tokens allowed by top-k and top-p at each position of a rollout, with their lengths."""
    if not top_k and top_p == 1.0:
        return 0.0
    return positions * INT32 * ((top_k or NUCLEUS) + 1)


def kv_cache(model: Model, rows: int, width: int) -> float:
    """Keys and values of every layer and token, and a second copy of one layer while rows move."""
    shape, zero = model
    return 2 * (shape.layers + 1) * rows * width * shape.keys * zero.size


def total(parts: Parts) -> float:
    """Bytes on the device, without host memory."""
    return sum(size for part, size in parts.items() if part != "host")

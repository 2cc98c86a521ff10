"""Seconds of forward passes, updates, decoding steps and collectives. Pure arithmetic.

A phase takes as long as the slowest of what it computes, reads, launches and sends; see `hardware.py`.
"""

import math
from collections import Counter
from typing import Literal, NamedTuple, assert_never

from launch.plan.hardware import Hardware
from launch.plan.memory import FP32, MOMENTS, Model

Seconds = Counter[str]  # by phase
Engine = Literal["eager", "compiled", "vllm"]  # of decoding

# Kernels of a decoding step of Llama in bf16: of a layer, of adapters on its 7 matrices, and of all else: the
# embedding, the head and sampling.
EAGER_KERNELS, ADAPTER_KERNELS, OTHER_KERNELS = 40, 28, 39
COMPILED_KERNELS = 13  # of a layer: 7 matrices, 2 norms, rotary, 2 writes to the cache and attention
VLLM_SECONDS = 0.002  # of its scheduler and sampler per step: an assumption
REDUCTION_SECONDS = 20e-6  # least time of an all-reduce among GPUs of a node: an assumption
# Bytes per parameter of an optimiser step on the GPU: AdamW reads 16 and writes 12; copies of the gradient to
# fp32 and of the weights to 16 bits, and the norm, move 16.
OPTIMISER_BYTES = 44


class Decoder(NamedTuple):
    """A model, and the parameters in its layers, without embeddings and head."""

    model: Model
    layers: float

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.model.shape.vocabulary * self.model.shape.hidden

    @property
    def bytes(self) -> float:
        """Size of all weights."""
        return self.model.zero.size * self.model.shape.parameters


class Rows(NamedTuple):
    """Rows of tokens of a rank."""

    count: float
    width: float  # tokens
    positions: float = 0  # of each row, at which logits are computed
    is_shared: bool = False  # several responses per row, behind a mask
    is_summed: bool = False  # the loss is a sum: gradients of the head are computed beside its logits

    @property
    def tokens(self) -> float:
        return self.count * self.width


class Cluster(NamedTuple):
    """Nodes of GPUs."""

    hardware: Hardware
    gpus_per_node: int


def forward_flops(decoder: Decoder, rows: Rows) -> float:
    """2 per parameter and token in matrices (Kaplan et al. 2020, 2.1), `attention_flops`, and the head's."""
    return 2 * decoder.layers * rows.tokens + attention_flops(decoder, rows) + head_flops(decoder, rows)


def attention_flops(decoder: Decoder, rows: Rows) -> float:
    """4 per layer, head width, token and earlier token; half of a causal mask is skipped, none of others."""
    shape = decoder.model.shape
    return (4 if rows.is_shared else 2) * shape.layers * shape.queries * rows.width * rows.tokens


def head_flops(decoder: Decoder, rows: Rows) -> float:
    """One product of the output head."""
    return 2 * decoder.head * rows.count * rows.positions


def training_flops(decoder: Decoder, rows: Rows, checkpointing: bool) -> float:
    """A forward and a backward pass: gradients of all activations and of trained weights.

    Attention's backward pass is twice its forward pass. Checkpointing recomputes layers, but for the last
    matrix of each if it has no adapter. The head computes its logits again, in chunks, unless `is_summed`.
    """
    shape = decoder.model.shape
    is_full = shape.trained == shape.parameters
    trained = decoder.layers if is_full else shape.trained
    matrices = 2 * decoder.layers * rows.tokens
    backward = matrices + 2 * trained * rows.tokens + 2 * attention_flops(decoder, rows)
    last = 2 * shape.layers * shape.mlp * shape.hidden * rows.tokens * is_full
    recomputed = checkpointing * (matrices - last + attention_flops(decoder, rows))
    of_head = (2 + is_full - rows.is_summed) * head_flops(decoder, rows)
    return forward_flops(decoder, rows) + recomputed + backward + of_head


def computing(flops: float, decoder: Decoder, hardware: Hardware) -> float:
    """Seconds of matrix products in the precision of the model."""
    return flops / (hardware.fp32_flops if decoder.model.zero.size == FP32 else hardware.matmul_flops)


def collective(size: float, ranks: int, cluster: Cluster) -> float:
    """Seconds to gather `size` bytes on all ranks, or to reduce them to a part per rank; an all-reduce: both.

    In a ring each of N GPUs receives (N - 1) / N of them, each of M nodes (M - 1) / M.
    """
    nodes = math.ceil(ranks / cluster.gpus_per_node)
    inside = size * (ranks - 1) / ranks / cluster.hardware.node_bandwidth
    return max(inside, size * (nodes - 1) / nodes / cluster.hardware.network_bandwidth)


def gathering(decoder: Decoder, cluster: Cluster, is_repeated: bool = False) -> float:
    """Seconds to fetch all weights of a model at stage 3, which DeepSpeed copies once more.

    is_repeated: since the last update, so that with hpZ its second copy is used.
    """
    zero = decoder.model.zero
    if zero.stage < 3:
        return 0.0
    ranks = zero.hpz if is_repeated and zero.hpz > 1 else zero.ranks
    from_host = decoder.bytes / zero.ranks / cluster.hardware.host_bandwidth * zero.offloads_weights
    copied = 2 * decoder.bytes / cluster.hardware.memory_bandwidth * (zero.ranks > 1)
    return collective(decoder.bytes, ranks, cluster) + copied + from_host


def scoring(decoder: Decoder, rows: Rows, passes: int, cluster: Cluster) -> Seconds:
    """Forward passes without gradients. Weights are fetched during the computation before."""
    seconds = computing(forward_flops(decoder, rows), decoder, cluster.hardware)
    fetching = passes * gathering(decoder, cluster, is_repeated=True)
    moved = 0.0
    if decoder.model.zero.offloads_weights and decoder.model.zero.stage < 3:
        moved = decoder.bytes / cluster.hardware.host_bandwidth
    return Seconds(scoring=seconds, communication=max(0, fetching - seconds), copies=moved)


def update(decoder: Decoder, rows: Rows, passes: int, checkpointing: bool, cluster: Cluster) -> Seconds:
    """An optimiser step on `rows` in `passes` micro-batches."""
    (shape, zero), hardware = decoder.model, cluster.hardware
    seconds = computing(training_flops(decoder, rows, checkpointing), decoder, hardware)
    gradients, part = zero.size * shape.trained, zero.size * shape.trained / zero.ranks
    is_summed_everywhere = zero.stage == 0 or (zero.stage < 3 and zero.all_reduces)
    reduction = collective(gradients, zero.ranks, cluster) * (1 + is_summed_everywhere)
    reductions = passes if zero.stage >= 2 else 1
    sent = reductions * reduction
    if zero.stage == 3:  # for the forward pass and for the backward pass
        sent += gathering(decoder, cluster) + (2 * passes - 1) * gathering(decoder, cluster, is_repeated=True)
    overlaps = zero.buffers > 1 or zero.stage == 3
    hidden = seconds * overlaps * (1 if zero.stage >= 2 else 1 / passes)
    exposed = max(0, sent - hidden)
    if zero.stage in (1, 2):  # the new weights
        exposed += collective(gradients, zero.ranks, cluster)
    copies = (passes + 1) * part / hardware.host_bandwidth * zero.offloads_optimiser
    return Seconds(
        updates=seconds, communication=exposed, copies=copies, optimiser=optimising(decoder, hardware)
    )


def optimising(decoder: Decoder, hardware: Hardware) -> float:
    """Seconds of AdamW on a rank's part of the parameters, on the GPU or on the host."""
    shape, zero = decoder.model
    part = shape.trained / zero.parts_of_optimiser
    if zero.offloads_optimiser:
        return part / hardware.cpu_adam_rate
    return part * OPTIMISER_BYTES / hardware.memory_bandwidth


def states_moved(decoder: Decoder, hardware: Hardware) -> float:
    """Seconds to move fp32 weights and moments of a rank to the host and back, with --offload_states."""
    shape, zero = decoder.model
    return 2 * (FP32 + MOMENTS) * shape.trained / zero.parts_of_optimiser / hardware.host_bandwidth


def decoding_step(
    decoder: Decoder, rows: int, width: int, engine: Engine, hardware: Hardware, ranks: int = 1,
    has_adapters: bool = False,
) -> float:  # fmt: skip
    """A token for each of the rows, with keys and values of `width` tokens.

    ranks: that share the weights in vLLM. has_adapters: that are not merged into the weights.
    """
    (shape, zero), read = decoder.model, decoder.layers + decoder.head
    products = computing(2 * read * rows, decoder, hardware)
    cache = 2 * shape.layers * rows * width * shape.keys * zero.size
    moved = max(products, zero.size * read / hardware.memory_bandwidth) + cache / hardware.cache_bandwidth
    compiled = COMPILED_KERNELS * shape.layers * hardware.kernel_seconds
    sampling = OTHER_KERNELS * hardware.kernel_seconds
    match engine:
        case "eager":
            of_layer = EAGER_KERNELS + ADAPTER_KERNELS * has_adapters
            kernels = of_layer * shape.layers + OTHER_KERNELS
            return max(kernels * hardware.launch_seconds, moved + kernels * hardware.kernel_seconds)
        case "compiled":
            return max(OTHER_KERNELS * hardware.launch_seconds, moved + compiled + sampling)
        case "vllm":
            size = 2 * zero.size * rows * shape.hidden
            reduction = REDUCTION_SECONDS + size * (ranks - 1) / ranks / hardware.node_bandwidth
            reductions = 2 * shape.layers * reduction * (ranks > 1)
            return moved / ranks + compiled + reductions + VLLM_SECONDS
        case _:
            assert_never(engine)

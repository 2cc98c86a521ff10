"""Bytes of activations, attention masks and caches. Pure arithmetic.

The counts follow the operations of transformers 5. Published formulas are cited.
"""

from typing import Literal

from launch.plan.memory import FP32, Model

# Attention masks: none, as kernels are causal; of packed rows, true and false; of shared prompts, in the type
# of the weights.
Mask = Literal["none", "packed", "shared"]


def activations(
    model: Model, rows: int, width: int, checkpointing: bool = False, mask: Mask = "none"
) -> float:
    """Activations that a forward pass over rows x width tokens saves for the backward pass, without the
    output head: those of each layer, or with checkpointing only its input; those of the last norm; the mask.
    """
    layer = rows * width * model.zero.size * model.shape.hidden
    if not checkpointing:
        layer = in_layer(model, rows, width, mask)
    last_norm = rows * width * _norm_and_output(model) * model.shape.hidden
    return model.shape.layers * layer + last_norm + of_mask(model, rows, width, mask)


def of_mask(model: Model, rows: int, width: int, mask: Mask) -> float:
    """An attention mask, which all layers share."""
    return rows * width**2 * {"none": 0, "packed": 1, "shared": model.zero.size}[mask]


def in_layer(model: Model, rows: int, width: int, mask: Mask = "none") -> float:
    """Activations that one layer saves for the backward pass.

    Counted as in Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
    section 4.1: 34 + 5 a s / h bytes per layer, token and unit of h), for the layers of transformers without
    dropout. Per token, with weights of e bytes and h = hidden:

    - 2 norms: LayerNorm saves its input, e h; RMSNorm its input in fp32 and, if its scale is trained, the
      normalised input, (4 + e) h. The matrices after a norm save its output, e h, except for norms of queries
      and keys.
    - attention: query and output, e x heads x head size each; key and value of the key-value heads; the
      log-sum-exp of each head. With a mask, keys and values are repeated for all heads; that of packed rows
      is converted to the type of the weights. Eager attention also saves the probabilities, s x heads.
    - MLP: e x its width, 4 times with a gate (gate, its activation, up, their product), 2 times without.
    """
    shape, e = model.shape, model.zero.size
    is_repeated = mask != "none" or shape.has_eager_attention
    attention = e * (2 * shape.queries + 2 * (shape.queries if is_repeated else shape.keys))
    attention += FP32 * shape.heads + e * width * (mask == "packed")
    if shape.has_eager_attention:
        attention += width * shape.heads * (FP32 + e * (e < FP32))
    layer = attention + e * shape.saved_in_mlp * shape.mlp
    layer += _norm_and_output(model) * shape.norms * shape.hidden
    return rows * width * (layer + (_norm_and_output(model) - e) * shape.head_norms)


def in_backward(model: Model, rows: int, width: int) -> float:
    """Gradients of activations in a layer at the same time: three of the MLP's width, and of the residual
    stream.
    """
    return rows * width * model.zero.size * (3 * model.shape.mlp + model.shape.hidden)


def last_states(model: Model, rows: int, width: int) -> float:
    """The input of the output head."""
    return rows * width * model.zero.size * model.shape.hidden


def _norm_and_output(model: Model) -> int:
    """Bytes per element that a norm, and the matrices after it, save."""
    shape, e = model.shape, model.zero.size
    if not shape.has_rms_norm:
        return e + e
    is_trained = shape.trained == shape.parameters
    return FP32 + e * is_trained + e


def passing(model: Model, rows: int, width: int, mask: Mask = "none") -> float:
    """Peak activations of a layer in a pass without gradients: three tensors of the MLP's width, and the
    residual stream before and after a norm; besides, the mask.
    """
    shape, zero = model
    scores = 2 * FP32 * shape.heads * width if shape.has_eager_attention else 0
    layer = rows * width * (zero.size * (3 * shape.mlp + 2 * shape.hidden) + scores)
    return layer + of_mask(model, rows, width, mask)


def kv_cache(model: Model, rows: int, width: int) -> float:
    """Keys and values of every layer and token, and a copy of the rows that move, at most half of them, one
    layer's keys or values at a time.
    """
    shape, zero = model
    return (2 * shape.layers + 1 / 2) * rows * width * shape.keys * zero.size

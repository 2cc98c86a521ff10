"""Bytes of logits, of the head in chunks, and of token lists. Pure arithmetic."""

from common.model.head import CHUNK
from launch.plan.memory import FP32, Model

INT32 = 4
NUCLEUS = 256  # tokens that top-p leaves on average: an assumption, high for a trained model


def logits(model: Model, positions: int) -> float:
    """Logits in fp32 at `positions` of a micro-batch, saved for the backward pass if they are one chunk."""
    size = positions * model.shape.vocabulary
    return size * FP32 if size == _in_chunk(model, positions) else 0.0


def gradient_of_logits(model: Model, positions: int) -> float:
    """Peak of the loss: log-probabilities, saved and of the entropy, probabilities and their product, in
    fp32. With several chunks, also the logits, and the gradient of a trained head.
    """
    (shape, zero), size = model, _in_chunk(model, positions)
    if size == positions * shape.vocabulary:
        return size * 4 * FP32
    of_head = zero.size * shape.vocabulary * shape.hidden * (shape.trained == shape.parameters)
    return of_head + size * 5 * FP32


def logits_in_scoring(model: Model, positions: int) -> float:
    """Pass without gradients: logits of a chunk in fp32 and log-probabilities; for models in 16 bits also
    logits scaled by --temperature.
    """
    return _in_chunk(model, positions) * FP32 * (3 if model.zero.size < FP32 else 2)


def logits_in_sampling(model: Model, rows: int) -> float:
    """Sampling of one token per row: logits; and in fp32 the same, log-probabilities, probabilities and their
    sums. --temperature scales them in place of the same.
    """
    return rows * model.shape.vocabulary * (model.zero.size + 4 * FP32)


def _in_chunk(model: Model, positions: int) -> int:
    """Logits in memory at once, of all positions or of a chunk of them."""
    vocabulary = model.shape.vocabulary
    return min(positions * vocabulary, max(CHUNK, vocabulary))


def allowed_tokens(top_k: int, top_p: float, positions: int) -> float:
    """Lists of the tokens allowed by top-k and top-p at each position of a rollout, with their lengths."""
    if not top_k and top_p == 1.0:
        return 0.0
    return positions * INT32 * ((top_k or NUCLEUS) + 1)

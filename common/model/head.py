"""The output head in chunks of tokens, so that the logits of all tokens are never in memory at once."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from common.model.families import adjust_logits
from common.numeric.tensor_ops import entropy, label_logprobs
from common.numeric.top_k_top_p import Support, restrict

# Logits at once: 256 MiB in fp32. A large vocabulary still has hundreds of tokens, for fast matrix products.
CHUNK = 2**26

# N states of rows (B, T): a mask (B, T), or rows and columns (N,), which may name a state several times.
Positions = Tensor | tuple[Tensor, Tensor]
Entropy = Literal["none", "value", "differentiable"]


class Targets(NamedTuple):
    """N labels, and the distribution under which their log-probabilities are taken."""

    labels: Tensor  # (N,)
    temperature: float = 1.0
    num_tokens: int | None = None  # ids from here on cannot be sampled; None: all can
    support: Support | None = None  # tokens left by top-k and top-p; None: all
    entropy: Entropy = "none"

    def split(self, size: int) -> list["Targets"]:
        """Parts of this many labels each."""
        labels = self.labels.split(size)
        supports = self.support.split(size) if self.support is not None else [None] * len(labels)
        return [self._replace(labels=a, support=b) for a, b in zip(labels, supports, strict=True)]


class ChunkedHead:
    """Context manager: in a forward pass inside, the model's head computes `result` in place of logits.

    result (2, N) fp32: log-probabilities and entropies at the N chosen positions; see `Targets`.

    The head stays one module that is called once per pass: ZeRO-3 fetches and frees weights around the call.
    The model's own code after the head gets a probe, which shows whether `adjust_logits` does the same.
    """

    def __init__(self, model: PreTrainedModel, positions: Positions, targets: Targets) -> None:
        self.result: Tensor
        self._head, self._config = model.get_output_embeddings(), model.config
        self._logits, self._positions, self._targets = self._head.forward, positions, targets

    def __enter__(self) -> "ChunkedHead":
        self._head.forward = self._forward
        # After the hooks of ZeRO-3, which add the backward pass's fetching of weights to the result.
        self._hook = self._head.register_forward_hook(self._take_result)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        del self._head.forward

    def is_exact(self, logits: Tensor) -> bool:
        """Whether the model's code made these logits of the probe, as `adjust_logits` does."""
        expected = adjust_logits(self._config, self._probe).float()
        return logits.shape == expected.shape and torch.allclose(logits.float(), expected, rtol=0.01)

    def _forward(self, states: Tensor) -> Tensor:
        rows = self._head.weight.shape[0]
        self._probe = torch.linspace(-60, 60, rows, dtype=states.dtype, device=states.device)[None]
        return in_chunks(
            lambda chunk: adjust_logits(self._config, self._logits(chunk)),
            states[self._positions], self._targets, rows,
        )  # fmt: skip

    def _take_result(self, _: nn.Module, __: Any, result: Tensor) -> Tensor:
        self.result = result
        return self._probe


def in_chunks(head: Callable[[Tensor], Tensor], states: Tensor, targets: Targets, vocabulary: int) -> Tensor:
    """Log-probabilities and entropies (2, N) of states (N, hidden size); see `Targets`.

    The backward pass computes the logits of each chunk again.
    """
    size = max(1, CHUNK // vocabulary)

    def compute(chunk: Tensor, part: Targets) -> Tensor:
        return logprobs_and_entropy(head(chunk), part)

    if len(states) <= size:
        return compute(states, targets)
    parts = [
        checkpoint(compute, chunk, part, use_reentrant=False, preserve_rng_state=False)
        for chunk, part in zip(states.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts, dim=1)


def logprobs_and_entropy(logits: Tensor, targets: Targets) -> Tensor:
    """Log-probabilities of the labels, and entropies or 0: logits (N, V) -> (2, N) fp32."""
    logits = logits[:, : targets.num_tokens]
    if targets.support is not None:
        logits = restrict(logits, targets.support)
    logprobs = label_logprobs(logits, targets.labels, targets.temperature)
    if targets.entropy == "none":
        return torch.stack([logprobs, torch.zeros_like(logprobs)])
    with torch.set_grad_enabled(torch.is_grad_enabled() and targets.entropy == "differentiable"):
        entropies = entropy(logits, targets.temperature)
    return torch.stack([logprobs, entropies])

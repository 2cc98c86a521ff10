"""The output head in chunks of tokens, so that the logits of all tokens are never in memory at once."""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from common.model.families import adjust_logits
from common.model.linear_head import LinearGradients, Wide, trained_weights, wide_logits
from common.model.unpadded import Positions
from common.numeric.tensor_ops import collision_entropy, entropy, label_logprobs, scaled
from common.numeric.top_k_top_p import Support, restrict

# Logits at once: 256 MiB in fp32. A large vocabulary still has hundreds of tokens, for fast matrix products.
CHUNK = 2**26

# Collision: that of Renyi of order 2, -log sum_v p(v)^2, without gradient; the others: Shannon's.
Entropy = Literal["none", "value", "differentiable", "collision"]
Adjust = Callable[[Tensor], Tensor]  # what a model does to each logit of its head


class Targets(NamedTuple):
    """N labels, and the distribution under which their log-probabilities are taken."""

    labels: Tensor  # (N,)
    temperature: float = 1.0
    num_tokens: int | None = None  # ids from here on cannot be sampled; None: all can
    support: Support | None = None  # tokens left by top-k and top-p; None: all
    entropy: Entropy = "none"
    is_summed: bool = False  # the loss depends on the sum of the log-probabilities alone, times a number

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
        self._positions, self._targets = positions, targets

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
        adjust = partial(adjust_logits, self._config)
        return in_chunks(self._head, states[self._positions], self._targets, adjust)

    def _take_result(self, _: nn.Module, __: Any, result: Tensor) -> Tensor:
        self.result = result
        return self._probe


def in_chunks(
    head: nn.Module, states: Tensor, targets: Targets, adjust: Adjust = lambda logits: logits
) -> Tensor:
    """Log-probabilities and entropies (2, N) of states (N, hidden size); see `Targets`."""
    size = max(1, CHUNK // len(head.weight))
    is_linear, weights = type(head) is nn.Linear, trained_weights(head).values()

    def compute(chunk: Tensor, part: Targets) -> Tensor:
        is_wide = is_linear and head.weight.dtype != torch.float32
        raw = Wide.apply(head, chunk, *weights) if is_wide else type(head).forward(head, chunk)
        return logprobs_and_entropy(adjust(raw), part)

    if len(states) <= size:
        return compute(states, targets)
    if is_linear and torch.is_grad_enabled():
        return LinearInChunks.apply(head, adjust, targets, size, states, *weights)
    parts = [
        checkpoint(compute, chunk, part, use_reentrant=False, preserve_rng_state=False)
        for chunk, part in zip(states.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts, dim=1)


def logprobs_and_entropy(logits: Tensor, targets: Targets) -> Tensor:
    """Log-probabilities of the labels, and entropies or 0: logits (N, V) -> (2, N) fp32."""
    logits = sampled(logits, targets)
    logprobs = label_logprobs(logits, targets.labels, targets.temperature)
    if targets.entropy == "none":
        return torch.stack([logprobs, torch.zeros_like(logprobs)])
    kind = collision_entropy if targets.entropy == "collision" else entropy
    with torch.set_grad_enabled(torch.is_grad_enabled() and targets.entropy == "differentiable"):
        entropies = kind(logits, targets.temperature)
    return torch.stack([logprobs, entropies])


def sampled(logits: Tensor, targets: Targets) -> Tensor:
    """Logits of the tokens that can be sampled: (N, V) -> (N, `num_tokens`), others masked."""
    logits = logits[:, : targets.num_tokens]
    if targets.support is not None:
        logits = restrict(logits, targets.support)
    return logits


class LinearInChunks(torch.autograd.Function):
    """`in_chunks` of a linear head, with gradients in closed form.

    Without chunks, a head takes three matrix products. So does a loss that `is_summed`: its gradients are
    computed beside the logits, in the forward pass. All others compute the logits again in the backward pass,
    but not their softmax, whose denominators are saved. In fp16 a sum is one of these, for the loss scale.

    `torch.nn.functional.linear_cross_entropy` would round the loss to the 16 bits of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, head: nn.Linear, adjust: Adjust, targets: Targets, size: int, states: Tensor, *_: Tensor
    ) -> Tensor:
        is_early = targets.is_summed and states.dtype != torch.float16
        gradients = LinearGradients(head) if is_early else None
        values = []  # (3, n) of each chunk: log-probabilities, entropies, logarithms of denominators
        for chunk, part in zip(states.split(size), targets.split(size), strict=True):
            raw, logits = _logits(head, adjust, chunk, part)
            logprobs = logits.detach().log_softmax(1)
            values.append(_values(logits.detach(), logprobs, part))
            if gradients:
                slopes = _slopes(logprobs, part, torch.ones_like(values[-1]), values[-1][1])
                gradients.add(chunk, *torch.autograd.grad(logits, raw, slopes))
        all_values = torch.cat(values, dim=1)
        ctx.save_for_backward(states, all_values)
        ctx.arguments, ctx.targets, ctx.size, ctx.gradients = (head, adjust), targets, size, gradients
        return all_values[:2].clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """upstream (2, N): derivatives of the loss by log-probabilities and entropies."""
        states, values = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients:
            factor = upstream[0, 0]
            is_sum = (upstream[0] == factor).all()
            factor = torch.where(is_sum, factor, torch.nan)
            return None, None, None, None, *(part.mul_(factor) for part in gradients.total())
        head, adjust = ctx.arguments
        gradients = LinearGradients(head)
        chunks = states.split(ctx.size), ctx.targets.split(ctx.size), values.split(ctx.size, 1)
        for chunk, part, (_, entropies, denominators), slope in zip(
            *chunks, upstream.split(ctx.size, 1), strict=True
        ):
            raw, logits = _logits(head, adjust, chunk, part)
            slopes = _slopes(logits.detach() - denominators[:, None], part, slope, entropies)
            gradients.add(chunk, *torch.autograd.grad(logits, raw, slopes))
        return None, None, None, None, *gradients.total()


def _logits(head: nn.Linear, adjust: Adjust, states: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Output of the head (n, V), and the logits made of it for the softmax (n, `num_tokens`), in fp32."""
    raw = wide_logits(head, states)
    with torch.enable_grad():
        raw = raw.detach().requires_grad_()
        return raw, scaled(sampled(adjust(raw), targets), targets.temperature)


def _values(logits: Tensor, logprobs: Tensor, targets: Targets) -> Tensor:
    """Log-probabilities of labels, entropies or 0, and logarithms of the softmax's denominators: (3, n)."""
    labels = targets.labels[:, None]
    of_labels = logprobs.gather(1, labels)[:, 0]
    entropies = torch.zeros_like(of_labels)
    if targets.entropy == "collision":
        entropies = -(2 * logprobs).logsumexp(1)
    elif targets.entropy != "none":
        entropies = -(logprobs.exp() * logprobs).sum(1)
    return torch.stack([of_labels, entropies, logits.gather(1, labels)[:, 0] - of_labels])


def _slopes(logprobs: Tensor, targets: Targets, upstream: Tensor, entropies: Tensor) -> Tensor:
    """Derivatives of the loss by logits, (n, V).

    With p = exp(logprobs): of the label's log-probability, 1[v = label] - p_v; of the entropy H,
    -p_v (log p_v + H).
    """
    by_label, by_entropy = upstream[0, :, None], upstream[1, :, None]
    factor = -by_label
    if targets.entropy == "differentiable":
        factor = factor - by_entropy * (logprobs + entropies[:, None])
    return logprobs.exp().mul_(factor).scatter_add_(1, targets.labels[:, None], by_label)

"""The gap between sampler and trainer: their log-probabilities of the same tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.model.engine_protocol import Engine
from common.model.forward import base_model
from common.numeric.tensor_ops import masked_mean
from step3_ppo.errors import SamplerError
from step3_ppo.losses import kl_loss
from step3_ppo.models import Models
from step3_ppo.options import PPOOptions
from step3_ppo.rollout import Rollout

# Largest mean gap in nats per token. Rounding gives about 0.01 in 16 bits and 1e-6 in fp32.
LIMIT_IN_16_BITS, LIMIT_IN_FP32 = 0.1, 1e-3


def is_rescored(models: Models) -> bool:
    """Whether scoring recomputes the actor's log-probabilities: with another sampler, and in 16 bits, where
    generation with a KV cache rounds differently from the update's forward pass.
    """
    return _is_in_16_bits(models.actor) or models.sampler is not models.actor


def largest_gap(models: Models, options: PPOOptions) -> float:
    """--max_rollout_gap, or the default of the precision."""
    return options.max_rollout_gap or (LIMIT_IN_16_BITS if _is_in_16_bits(models.actor) else LIMIT_IN_FP32)


def describe_gap(logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """The gap from the log-probabilities of trainer and sampler, each (B, R) and 0 after a response.

    `gap_mean`, `gap_max`: |trainer - sampler| in nats per token. `gap_kl`: KL of the sampler from the trainer
    (k3) in nats per token. `ess`: effective sample size (sum w)^2 / sum w^2 as a share of B, with w the ratio
    of the probabilities of a response. Source: Kong 1992.
    """
    logprobs, behaviour_logprobs = logprobs.double(), behaviour_logprobs.double()
    gap = logprobs - behaviour_logprobs
    log_weights = gap.sum(1)
    log_size = 2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)
    return {
        "rollout/gap_mean": masked_mean(gap.abs(), mask).item(),
        "rollout/gap_max": gap.abs().max().item(),
        "rollout/gap_kl": masked_mean(kl_loss(behaviour_logprobs, logprobs, "k3"), mask).item(),
        "rollout/ess": log_size.exp().item() / len(gap),
    }


class SamplerGap:
    """Measures the gap before the first update of an iteration, without a forward pass of its own.

    Where scoring has recomputed the log-probabilities, it compares all of them. Else the passes of the first
    minibatch give those of its rows.
    """

    def __init__(self, rollout: Rollout, minibatch: Sequence[int], is_rescored: bool, limit: float) -> None:
        """limit: largest mean gap in nats per token; SamplerError is raised beyond it."""
        self.metrics: dict[str, float] = {}
        self._rollout, self._minibatch, self._limit = rollout, minibatch, limit
        self._batches: list[list[int]] = []
        self._parts: list[Tensor] = []
        if is_rescored:
            self._measure(rollout.logprobs, range(len(rollout.scores)))

    def add(self, batch: list[int], logprobs: Tensor, is_last: bool) -> None:
        """Log-probabilities (N,) of a micro-batch, before its backward pass. Once measured, does nothing.

        is_last: of the minibatch; all ranks then measure. Raises SamplerError.
        """
        if self.metrics:
            return
        self._batches.append(batch)
        self._parts.append(logprobs.detach())
        if is_last:
            self._measure(self._rollout.scatter(self._batches, self._parts), self._minibatch)

    def _measure(self, logprobs: Tensor, rows: Sequence[int]) -> None:
        rollout, rows = self._rollout, [*rows]
        self.metrics = describe_gap(
            logprobs[rows], rollout.behaviour_logprobs[rows], rollout.response_mask[rows]
        )
        if (gap := self.metrics["rollout/gap_mean"]) > self._limit:
            raise SamplerError(
                f"--max_rollout_gap {self._limit:g}: sampler and trainer differ by {gap:.2g} nats per token;"
                " usual causes are another temperature, top-k or top-p, old weights and a damaged cache"
            )


def _is_in_16_bits(actor: Engine) -> bool:
    return next(base_model(actor).parameters()).dtype != torch.float32

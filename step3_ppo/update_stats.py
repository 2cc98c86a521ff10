"""Losses, sums over tokens and gradient norms of the updates of one PPO step, and their means."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from common.runtime.distributed import sum_over_ranks
from common.training.means import Mean

Sums = Counter[str]  # this rank's sums over response tokens by metric, and `tokens`


def squared_change(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """The k2 estimate of a KL divergence, summed over tokens: (N,), (N,) -> ()."""
    return 0.5 * ((logprobs - old_logprobs) ** 2).sum()


@dataclass
class UpdateStats:
    """Collects losses and norms during the updates. Ranks meet at the end of each update."""

    sums: Sums = field(default_factory=Counter)
    norms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    experts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of the actor
    ptx_losses: list[Tensor] = field(default_factory=list)  # this rank's share, by update
    _first: dict[str, float] = field(default_factory=dict)  # sums after the first update
    _moved: float = 0.0  # sum of policy/approx_kl after the last update

    def end_update(self) -> float:
        """Return the KL to the rollout policy before this update: k2 of its minibatch, summed over ranks."""
        self._first = self._first or {name: float(total) for name, total in self.sums.items()}
        before, self._moved = self._moved, float(self.sums["policy/approx_kl"])
        (moved,) = sum_over_ranks(self._moved - before)
        return moved

    def add_experts(self, metrics: dict[str, Mean]) -> None:
        """Add the metrics of a mixture of experts in one update."""
        for name, mean in metrics.items():
            self.experts[name].append(mean.value)

    def metrics(self) -> dict[str, Mean | float]:
        """Means over tokens, mean norms, and how many updates were skipped for a norm that is not finite."""
        metrics = self._means() | {name: _mean_norm(norms) for name, norms in self.norms.items() if norms}
        metrics |= {name: Mean(sum(values), len(values)) for name, values in self.experts.items()}
        if self.ptx_losses:
            metrics["ptx/loss"] = Mean(sum_over_ranks(sum(self.ptx_losses))[0], len(self.ptx_losses))
        skipped = sum(not math.isfinite(norm) for norms in self.norms.values() for norm in norms)
        return metrics | {"train/skipped_updates": skipped}

    def _means(self) -> dict[str, Mean]:
        """Means over the tokens of all ranks and updates; for the ratio, of the first update."""
        totals = [*self.sums.values(), self._first["tokens"], self._first.get("policy/ratio", 0.0)]
        *totals, first_tokens, first_ratio = sum_over_ranks(*totals)
        by_name = dict(zip(self.sums, totals, strict=True))
        count = by_name.pop("tokens")
        means = {name: Mean(total, count) for name, total in by_name.items()}
        if "policy/ratio" in means:
            means["policy/ratio"] = Mean(first_ratio, first_tokens)
        return means


def _mean_norm(norms: list[float]) -> Mean:
    """The mean over the updates that were not skipped; infinite if all were."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    return Mean(sum(finite), len(finite)) if finite else Mean(math.inf)

"""The reward shift of BCO: a running mean of rewards, saved with every checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class RewardShift:
    """Mean log-ratio of chosen and rejected responses, either side half, over the steps so far.

    BCO classifies a response with a higher log-ratio as a chosen one. Source: Jung et al. 2024. A
    step uses the mean of those before it: all ranks know it, and it needs no pass of its own.
    """

    mean: float = 0.0  # nats per response
    steps: int = 0

    @classmethod
    def load(cls, saved: Mapping[str, float]) -> "RewardShift":
        """That of a checkpoint (`TrainState.controllers`), or of a new run if `saved` is empty."""
        return cls(saved.get("shift_mean", 0.0), int(saved.get("shift_steps", 0)))

    def add(self, chosen: float, rejected: float) -> None:
        """Add the mean log-ratios of a step; numbers that are not finite are left out."""
        batch = 0.5 * (chosen + rejected)
        if math.isfinite(batch):
            self.steps += 1
            self.mean += (batch - self.mean) / self.steps

    def plain(self) -> dict[str, float]:
        """Numbers by name, for a checkpoint."""
        return {"shift_mean": self.mean, "shift_steps": self.steps} if self.steps else {}

"""State of PPO besides the engines."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import assert_never

from step3_ppo.kl_penalty import KLPenalty
from step3_ppo.options import PPOOptions
from step3_ppo.rewards import RunningScale


@dataclass
class PPOState:
    """Saved with every checkpoint, as numbers by name (`TrainState.controllers`)."""

    kl: KLPenalty
    score_scale: RunningScale  # of all scores so far, with --normalise_scores
    baseline: float | None = None  # moving average of the mean return, with --reinforce_baseline moving
    ptx_batches: int = 0  # batches of --ptx_data used so far

    @classmethod
    def load(cls, options: PPOOptions, saved: Mapping[str, float]) -> "PPOState":
        """The state of a checkpoint, or of a new run if `saved` is empty."""
        scale = RunningScale(*(saved.get(f"score_{field.name}", 0.0) for field in fields(RunningScale)))
        kl = make_kl_penalty(options, saved.get("kl_coef", options.kl_coef))
        return cls(kl, scale, saved.get("baseline"), int(saved.get("ptx_batches", 0)))

    def plain(self) -> dict[str, float]:
        """Numbers by name, without those that the options do not use."""
        numbers = {"kl_coef": self.kl.coef}
        if self.score_scale.count:
            numbers |= {f"score_{name}": value for name, value in vars(self.score_scale).items()}
        if self.baseline is not None:
            numbers["baseline"] = self.baseline
        if self.ptx_batches:
            numbers["ptx_batches"] = self.ptx_batches
        return numbers


def make_kl_penalty(options: PPOOptions, coef: float) -> KLPenalty:
    """The KL penalty of the options, with its current coefficient."""
    match options.kl_controller:
        case "fixed":
            return KLPenalty(coef, options.kl_penalty)
        case "adaptive":
            return KLPenalty(coef, options.kl_penalty, options.kl_target, options.kl_horizon)
        case _:
            assert_never(options.kl_controller)

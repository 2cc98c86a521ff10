"""State of PPO besides the engines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import assert_never

from step3_ppo.critic_warmup import shortened_warmup
from step3_ppo.entropy_band import adapted_coef, bonus_weight
from step3_ppo.kl_penalty import KLPenalty
from step3_ppo.options import PPOOptions
from step3_ppo.rewards import RunningScale


@dataclass
class PPOState:
    """Saved with every checkpoint, as numbers by name (`TrainState.controllers`)."""

    kl: KLPenalty
    score_scale: RunningScale  # of all scores so far, with --normalise_scores sum
    baseline: float | None = None  # moving average of the mean return, with --reinforce_baseline moving
    ptx_batches: int = 0  # batches of --ptx_data used so far
    entropy_coef: float | None = None  # with an entropy band; see `bonus_weight`
    entropy: float = 0.0  # of the last iteration, with an entropy band
    warmup_steps: int | None = None  # of the critic, if --critic_warmup_until has ended them
    # With --normalise_scores each, by reward model and function: of all scores so far, and of the first ones.
    part_scales: list[RunningScale] = field(default_factory=list)
    first_scales: list[RunningScale] = field(default_factory=list)

    @classmethod
    def load(cls, options: PPOOptions, saved: Mapping[str, float]) -> "PPOState":
        """The state of a checkpoint, or of a new run if `saved` is empty."""
        scale = RunningScale(*(saved.get(f"score_{field.name}", 0.0) for field in fields(RunningScale)))
        kl = make_kl_penalty(options, saved.get("kl_coef", options.kl_coef))
        state = cls(kl, scale, saved.get("baseline"), int(saved.get("ptx_batches", 0)))
        if options.entropy_high:
            state.entropy_coef = saved.get("entropy_coef", options.entropy_coef)
            state.entropy = saved.get("entropy", 0.0)
        if "warmup_steps" in saved:
            state.warmup_steps = int(saved["warmup_steps"])
        state.part_scales, state.first_scales = _scales("part", saved), _scales("first", saved)
        return state

    def current(self, options: PPOOptions) -> PPOOptions:
        """The options of the next iteration, with the numbers that a run adapts."""
        if self.entropy_coef is not None:
            weight = bonus_weight(self.entropy_coef, self.entropy, options.entropy_high)
            options = replace(options, entropy_coef=weight)
        if self.warmup_steps is not None:
            options = replace(options, critic_warmup_steps=self.warmup_steps)
        return options

    def coefficients(self, current: PPOOptions) -> dict[str, float]:
        """Metrics: the coefficients of an iteration with these options, from `current`."""
        entropy = {} if self.entropy_coef is None else {"policy/entropy_coef": current.entropy_coef}
        return {"kl/coef": self.kl.coef} | entropy

    def adapt(self, options: PPOOptions, step: int, metrics: Mapping[str, float]) -> None:
        """Adapt the numbers after an iteration."""
        self.kl.update(metrics["kl/mean"], options.rollout_batch_size)
        if self.entropy_coef is not None and "policy/entropy" in metrics:
            self.entropy = metrics["policy/entropy"]
            self.entropy_coef = adapted_coef(
                self.entropy_coef, self.entropy, options.entropy_low, options.entropy_high,
                options.entropy_coef_step,
            )  # fmt: skip
        if options.critic_warmup_until and self.warmup_steps is None:
            self.warmup_steps = shortened_warmup(
                options.critic_warmup_steps, step, metrics["value/explained_var"], options.critic_warmup_until
            )

    def plain(self) -> dict[str, float]:
        """Numbers by name, without those that the options do not use."""
        numbers = {"kl_coef": self.kl.coef}
        if self.score_scale.count:
            numbers |= {f"score_{name}": value for name, value in vars(self.score_scale).items()}
        if self.baseline is not None:
            numbers["baseline"] = self.baseline
        if self.ptx_batches:
            numbers["ptx_batches"] = self.ptx_batches
        if self.entropy_coef is not None:
            numbers |= {"entropy_coef": self.entropy_coef, "entropy": self.entropy}
        if self.warmup_steps is not None:
            numbers["warmup_steps"] = self.warmup_steps
        return numbers | _numbers("part", self.part_scales) | _numbers("first", self.first_scales)


def _numbers(name: str, scales: Sequence[RunningScale]) -> dict[str, float]:
    """The numbers of scales, as `_scales` reads them."""
    return {
        f"{name}_{part}_{number}": value
        for part, scale in enumerate(scales)
        for number, value in vars(scale).items()
    }


def _scales(name: str, saved: Mapping[str, float]) -> list[RunningScale]:
    count = sum(key.startswith(f"{name}_") and key.endswith("_count") for key in saved)
    names = [one.name for one in fields(RunningScale)]
    return [RunningScale(*(saved[f"{name}_{part}_{number}"] for number in names)) for part in range(count)]


def make_kl_penalty(options: PPOOptions, coef: float) -> KLPenalty:
    """The KL penalty of the options, with its current coefficient."""
    match options.kl_controller:
        case "fixed":
            return KLPenalty(coef, options.kl_penalty)
        case "adaptive":
            return KLPenalty(coef, options.kl_penalty, options.kl_target, options.kl_horizon)
        case _:
            assert_never(options.kl_controller)

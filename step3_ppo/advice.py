"""What a look at KL and reward of the last iterations suggests."""

from collections.abc import Sequence
from statistics import fmean, pstdev

from common.distributed import log
from common.train_state import TrainState

REMEMBERED = 20  # iterations that are looked at
JUMP = 5  # iterations within which KL must not rise by MOST_RISE nats
MOST_RISE = 2.0
FAR = 20.0  # nats per response
IDLE = 0.1  # nats per response


def advise(state: TrainState, step: int, found: dict[str, float]) -> None:
    """Remember the metrics of an iteration, and log advice that did not hold an iteration ago."""
    before = {name: list(values) for name, values in state.recent.items()}
    for name in ("kl/mean", "reward/mean"):
        state.recent[name] = [*state.recent.get(name, []), found[name]][-REMEMBERED:]
    said, earlier = (
        kl_advice(recent.get("kl/mean", []), recent.get("reward/mean", []), found["kl/coef"])
        for recent in (state.recent, before)
    )
    if said and not earlier:
        log(f"step {step}: {said}")


def kl_advice(kl: Sequence[float], reward: Sequence[float], kl_coef: float) -> str:
    """One sentence when KL has left its usual range, else nothing.

    kl: nats per response, reward: mean score, of the last iterations, at most REMEMBERED.
    """
    if not kl:
        return ""
    coefficient = f"--kl_coef (now {kl_coef:.3g}; usual: 0.01 to 0.1)"
    if kl[-1] > FAR:
        return (
            f"KL is {kl[-1]:.1f} nats per response, above {FAR:g}: the policy has drifted too far for"
            f" its scores; raise {coefficient}, or take an earlier checkpoint"
        )
    if (rise := kl[-1] - min(kl[-JUMP:])) > MOST_RISE:
        return (
            f"KL rose by {rise:.1f} nats per response within {JUMP} iterations, to {kl[-1]:.1f}: raise"
            f" {coefficient}, or lower --actor_learning_rate"
        )
    if len(kl) == REMEMBERED and max(kl) < IDLE:
        half = REMEMBERED // 2
        gain, noise = fmean(reward[half:]) - fmean(reward[:half]), pstdev(reward) / half**0.5
        if gain < 2 * noise:
            return (
                f"KL has stayed below {IDLE:g} nats per response for {REMEMBERED} iterations and the score is"
                f" flat: lower {coefficient}, or raise --actor_learning_rate"
            )
    return ""

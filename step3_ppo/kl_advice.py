"""What KL and rewards of the last iterations suggest to change."""

from collections.abc import Sequence
from statistics import fmean, pstdev

from common.runtime.distributed import log
from common.training.train_state import TrainState
from step3_ppo.options import KLOptions, PPOOptions

REMEMBERED = 20  # iterations that are looked at, and within which nothing is said twice
JUMP = 5  # iterations within which KL must not rise by MOST_RISE nats
MOST_RISE = 2.0
FAR = 20.0  # nats per response
IDLE = 0.1  # nats per response
USUAL_COEF = (0.01, 0.1)
USUAL_TARGET = (6.0, 10.0)  # nats per response, of the adaptive controller


def advise(state: TrainState, step: int, found: dict[str, float], options: PPOOptions) -> None:
    """Remember the metrics of an iteration, and log what they suggest, unless it was suggested lately."""
    recent = state.recent
    if step > options.critic_warmup_steps:  # until then nothing moves the actor
        for name in ("kl/mean", "reward/mean"):
            recent[name] = [*recent.get(name, []), found[name]][-REMEMBERED:]
    said = kl_advice(recent.get("kl/mean", []), recent.get("reward/mean", []), found["kl/coef"], options)
    for rule, sentence in said.items():
        (held,) = recent.get(rule, [-REMEMBERED])
        if step - held > REMEMBERED:
            log(f"step {step}: {sentence}")
        recent[rule] = [step]


def warn_of_penalty(found: dict[str, float], options: PPOOptions) -> None:
    """Log a --missing_eos_penalty as large as the spread of the scores, if it met a response.

    found: metrics of the first iteration.
    """
    penalty, cut = options.missing_eos_penalty, 1.0 - found["response/eos_rate"]
    spread = 1.0 if options.normalise_scores else found["reward/std"]
    if penalty and cut and penalty >= spread:
        log(
            f"step 1: --missing_eos_penalty {penalty:g} is as large as the spread of the scores (standard"
            f" deviation {spread:.3g}), and {cut:.0%} of the responses were cut before EOS: the policy learns"
            f" to end, more than to score. Use at most {spread / 2:.2g}, or raise --max_response_length"
        )


def kl_advice(
    kl: Sequence[float], reward: Sequence[float], kl_coef: float, options: KLOptions
) -> dict[str, str]:
    """A sentence for each rule by which KL has left its usual range.

    kl: nats per response, reward: mean score, of the last iterations, at most REMEMBERED.
    """
    said = {}
    if not kl:
        return said
    if kl[-1] > FAR:
        said["far"] = (
            f"KL is {kl[-1]:.1f} nats per response, above {FAR:g}: the policy has drifted too far for"
            f" its scores; {_steer(kl_coef, options, closer=True)}, or take an earlier checkpoint"
        )
    # Above all that was before, so that a curve that swings around its level has not jumped.
    if (rise := kl[-1] - max(kl[: 1 - JUMP] or kl[:1])) > MOST_RISE:
        said["jump"] = (
            f"KL rose by {rise:.1f} nats per response within {JUMP} iterations, to {kl[-1]:.1f}:"
            f" {_steer(kl_coef, options, closer=True)}, lower --actor_learning_rate, or have it rise over a"
            " longer --warmup_ratio"
        )
    if len(kl) == REMEMBERED and max(kl) < IDLE and kl_coef:
        half = REMEMBERED // 2
        gain, noise = fmean(reward[half:]) - fmean(reward[:half]), pstdev(reward) / half**0.5
        if gain <= 2 * noise:
            said["idle"] = (
                f"KL has stayed below {IDLE:g} nats per response for {REMEMBERED} iterations and the score is"
                f" flat: {_steer(kl_coef, options, closer=False)}, or raise --actor_learning_rate"
            )
    return said


def _steer(kl_coef: float, options: KLOptions, closer: bool) -> str:
    """The option that brings KL down (closer) or up, and its usual range where that lies ahead."""
    if options.kl_controller == "adaptive":
        name, now, (low, high), is_more = "--kl_target", options.kl_target, USUAL_TARGET, not closer
    else:
        name, now, (low, high), is_more = "--kl_coef", kl_coef, USUAL_COEF, closer
    is_ahead = now < high if is_more else now > low
    usual = f"; usual: {low:g} to {high:g}" * is_ahead
    return f"{'raise' if is_more else 'lower'} {name} (now {now:.3g}{usual})"

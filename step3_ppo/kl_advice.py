"""Advice on KL during training, from the KL and rewards of the last iterations."""

from collections.abc import Sequence
from statistics import fmean, pstdev

from common.runtime.distributed import log
from common.training.train_state import TrainState
from step3_ppo.option_groups import KLOptions
from step3_ppo.options import PPOOptions

REMEMBERED = 20  # iterations considered, and iterations without a symptom before its advice is logged again
JUMP = 5  # iterations within which KL must not rise by MOST_RISE nats
MOST_RISE = 2.0
FAR = 20.0  # nats per response
IDLE = 0.1  # nats per response
USUAL_COEF = (0.01, 0.1)
USUAL_TARGET = (6.0, 10.0)  # nats per response, of the adaptive controller


def advise(state: TrainState, step: int, metrics: dict[str, float], options: PPOOptions) -> None:
    """Store the metrics of an iteration, and log advice once per symptom while it persists."""
    recent = state.recent
    if step > options.critic_warmup_steps:  # until then the actor does not change
        for name in ("kl/mean", "reward/mean"):
            recent[name] = [*recent.get(name, []), metrics[name]][-REMEMBERED:]
    advice = kl_advice(recent.get("kl/mean", []), recent.get("reward/mean", []), metrics["kl/coef"], options)
    for rule, sentence in advice.items():
        (last_step,) = recent.get(rule, [-REMEMBERED])
        if step - last_step > REMEMBERED:
            log(f"step {step}: {sentence}")
        recent[rule] = [step]


def warn_of_penalty(metrics: dict[str, float], options: PPOOptions) -> None:
    """Warn if --missing_eos_penalty exceeds the spread of the scores, and some responses were truncated.

    metrics: of the first iteration.
    """
    penalty, truncated = options.missing_eos_penalty, 1.0 - metrics["response/eos_rate"]
    spread = 1.0 if options.normalise_scores == "sum" else metrics["reward/std"]
    if penalty and truncated and penalty >= spread:
        log(
            f"warning: --missing_eos_penalty {penalty:g} is as large as the spread of the first scores"
            f" (standard deviation {spread:.3g}), and {truncated:.0%} of the responses were truncated: the"
            f" penalty outweighs the scores. Use at most {spread / 2:.2g}, or raise --max_response_length"
        )


def kl_advice(
    kl: Sequence[float], reward: Sequence[float], kl_coef: float, options: KLOptions
) -> dict[str, str]:
    """Advice by rule, for each rule that KL breaks.

    kl: nats per response; reward: mean score; both of the last iterations, at most REMEMBERED.
    """
    advice = {}
    if not kl:
        return advice
    if kl[-1] > FAR:
        advice["far"] = (
            f"KL is {kl[-1]:.1f} nats per response, above {FAR:g}: so far from the reference, scores are"
            f" unreliable; {_steer(kl_coef, options, closer=True)}, or use an earlier checkpoint"
        )
    # Compared with the previous maximum, so that swings around a level are no jumps.
    if (rise := kl[-1] - max(kl[: 1 - JUMP] or kl[:1])) > MOST_RISE:
        advice["jump"] = (
            f"KL rose by {rise:.1f} nats per response within {JUMP} iterations, to {kl[-1]:.1f}:"
            f" {_steer(kl_coef, options, closer=True)}, lower --actor_learning_rate, or use a longer"
            " --warmup_ratio"
        )
    if len(kl) == REMEMBERED and max(kl) < IDLE and kl_coef:
        half = REMEMBERED // 2
        gain, noise = fmean(reward[half:]) - fmean(reward[:half]), pstdev(reward) / half**0.5
        if gain <= 2 * noise:
            advice["idle"] = (
                f"KL has stayed below {IDLE:g} nats per response for {REMEMBERED} iterations and the score is"
                f" flat: {_steer(kl_coef, options, closer=False)}, or raise --actor_learning_rate"
            )
    return advice


def _steer(kl_coef: float, options: KLOptions, closer: bool) -> str:
    """The option that lowers KL (closer) or raises it, with its usual range unless it is already beyond."""
    if options.kl_controller == "adaptive":
        name, now, (low, high), is_more = "--kl_target", options.kl_target, USUAL_TARGET, not closer
    else:
        name, now, (low, high), is_more = "--kl_coef", kl_coef, USUAL_COEF, closer
    is_ahead = now < high if is_more else now > low
    usual = f"; usual: {low:g} to {high:g}" * is_ahead
    return f"{'raise' if is_more else 'lower'} {name} (now {now:.3g}{usual})"

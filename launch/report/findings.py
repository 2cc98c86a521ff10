"""What the curves of a run say in words: known troubles, each found by a simple rule. Pure.

Rules that judge a change compare the mean over the first fifth of a curve with that over the last. Thresholds
are rules of thumb: a finding is a reason to look, not a proof.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import fmean, median

from launch.report.hacks import ERRORS, Finding, format_hack, length_hack, over_optimisation, repetition
from launch.report.read import Line, columns
from launch.report.trends import FEWEST, Values, ends, error_of_change
from step3_ppo.advice import FAR, IDLE, JUMP, MOST_RISE

LEAST_ENTROPY, LEAST_VARIETY = 0.1, 0.5  # of what it was at the start
SOME_EOS, NO_EOS = 0.1, 0.01  # shares of responses that end by themselves
MOST_CLIPPED = 0.3  # share of tokens, in a quarter of the steps or more
LARGEST_RISE = 0.05  # of the evaluation loss, relative to its lowest, or of NLL to its start


def findings(lines: Sequence[Line], samples: Sequence[Line] = ()) -> list[Finding]:
    """All that stands out in the lines of metrics.jsonl and of samples.jsonl."""
    checks: list[tuple[Callable[..., Finding | None], list[tuple[str, ...]]]] = [
        (over_optimisation, [("step", "eval/score", "eval/gold")]),
        (length_hack, [("reward/mean", "response/length")]),
        (repetition, [("response/repeated_3",), ("response/distinct_2",), ("reward/mean",)]),
        (entropy_collapse, [("policy/entropy",)]),
        (variety_collapse, [("eval/distinct_2",)]),
        (no_endings, [("response/eos_rate",)]),
        (kl_too_small, [("kl/mean", "reward/mean")]),
        (kl_jump, [("step", "kl/mean")]),
        (kl_too_large, [("step", "kl/mean")]),
        (blind_critic, [("value/explained_var",)]),
        (clipped_updates, [("policy/clip_fraction",)]),
        (overfitting, [("step", "train/loss"), ("step", "eval/loss")]),
        (unlearning, [("eval/nll_chosen",)]),
    ]
    found = []
    for check, groups in checks:
        values = [column for names in groups for column in columns(lines, *names)]
        found += filter(None, [check(*values)])
    return [*found, *filter(None, [format_hack(samples, *columns(lines, "eval/score"))])]


def entropy_collapse(entropies: Values) -> Finding | None:
    """A policy that no longer explores."""
    start, end = ends(entropies)
    if not end < LEAST_ENTROPY * start:
        return None
    return Finding(
        f"Collapsed entropy: policy/entropy fell from {start:.3g} to {end:.3g} nats per token.",
        "--entropy_coef; a higher --kl_coef; a lower --actor_learning_rate.",
    )


def variety_collapse(distinct: Values) -> Finding | None:
    """Held-out responses that have lost their form."""
    start, end = ends(distinct)
    if not end < LEAST_VARIETY * start:
        return None
    return Finding(
        f"Collapsed variety: eval/distinct_2 fell from {start:.1%} to {end:.1%}.",
        "look at the samples; a higher --kl_coef; a lower --actor_learning_rate; an earlier checkpoint.",
    )


def no_endings(rates: Values) -> Finding | None:
    """Responses that no longer end by themselves."""
    start, end = ends(rates)
    if not (start > SOME_EOS and end < NO_EOS):
        return None
    return Finding(
        f"Responses do not end any more: response/eos_rate fell from {start:.1%} to {end:.1%}.",
        "a higher --missing_eos_penalty; a longer --max_response_length; --length_penalty.",
    )


def kl_too_small(kls: Values, rewards: Values) -> Finding | None:
    """A policy that stays where it was, and gains nothing there."""
    (low, high), (_, kl) = ends(rewards), ends(kls)
    if len(rewards) < FEWEST or kl >= IDLE or abs(high - low) > ERRORS * error_of_change(rewards):
        return None
    return Finding(
        f"Nothing is learnt: kl/mean is {kl:.2g} nats at the end, and reward/mean went from {low:.3g} to"
        f" {high:.3g}, which is noise.",
        "a lower --kl_coef; a higher --actor_learning_rate; more steps.",
    )


def kl_jump(steps: Values, kls: Values) -> Finding | None:
    """A policy that moves too fast: above all that was before, as a curve may swing around its level."""
    highest = list(accumulate(kls, max))
    near = [
        (kls[later] - highest[first], first, later)
        for first in range(len(kls))
        for later in range(first + 1, min(first + 1 + JUMP, len(kls)))
        if steps[later] - steps[first] <= JUMP
    ]
    jump, first, later = max(near, default=(0.0, 0, 0))
    if jump <= MOST_RISE:
        return None
    return Finding(
        f"A jump of KL: kl/mean went from {max(kls[first], 0):.2f} to {kls[later]:.2f} nats between steps"
        f" {steps[first]} and {steps[later]}.",
        "a higher --kl_coef, or --kl_controller adaptive with a low --target_kl; a lower"
        " --actor_learning_rate, or a longer --warmup_ratio to it.",
    )


def kl_too_large(steps: Values, kls: Values) -> Finding | None:
    """A policy that has left the reference behind."""
    above = [step for step, kl in zip(steps, kls, strict=True) if kl > FAR]
    if not above:
        return None
    return Finding(
        f"Drifted far: kl/mean exceeds {FAR:.0f} nats from step {above[0]} and ends at {kls[-1]:.3g}.",
        "a higher --kl_coef, or --kl_controller adaptive with a --target_kl; the samples before that step.",
    )


def blind_critic(explained: Values) -> Finding | None:
    """A critic that foresees less than a constant would, by the median over the second half."""
    if len(explained) < FEWEST or (later := median(explained[len(explained) // 2 :])) >= 0:
        return None
    return Finding(
        f"The critic does not learn: value/explained_var has a median of {later:.2f} in the second half.",
        "a higher --critic_learning_rate; --critic_warmup_steps; --normalise_scores; larger rollouts.",
    )


def clipped_updates(fractions: Values) -> Finding | None:
    """Updates of which the clip cuts much off."""
    if not fractions or (often := sorted(fractions)[len(fractions) * 3 // 4]) <= MOST_CLIPPED:
        return None
    return Finding(
        f"Updates too large: policy/clip_fraction is {often:.2f} or more in a quarter of the steps.",
        "a lower --actor_learning_rate; fewer --ppo_epochs; a larger --global_batch_size.",
    )


def overfitting(
    train_steps: Values, train_losses: Values, eval_steps: Values, eval_losses: Values
) -> Finding | None:
    """A held-out loss above its lowest, while that in training fell: over as many lines before as after."""
    lowest, best = min(zip(eval_losses, eval_steps, strict=True), default=(math.inf, 0))
    after = [loss for step, loss in zip(train_steps, train_losses, strict=True) if step > best]
    before = list(train_losses[: len(train_losses) - len(after)])[-len(after) :]
    if not (after and before) or eval_losses[-1] <= lowest * (1 + LARGEST_RISE):
        return None
    was, now = fmean(before), fmean(after)
    if now >= was:
        return None
    return Finding(
        f"Overfitting: eval/loss rose from {lowest:.3g} at step {best} to {eval_losses[-1]:.3g}, while"
        f" train/loss fell from {was:.3g} to {now:.3g}.",
        "--best_metric eval/loss; fewer --num_train_epochs; a lower --learning_rate; more data.",
    )


def unlearning(nlls: Values) -> Finding | None:
    """Chosen responses that become less likely, as the rejected ones do: by their NLL, nats per token."""
    start, end = ends(nlls)
    if not end > start * (1 + LARGEST_RISE):
        return None
    return Finding(
        f"The chosen is unlearnt too: eval/nll_chosen rose from {start:.3g} to {end:.3g} nats per token.",
        "a higher --beta; a lower --learning_rate; --loss cpo; an earlier checkpoint.",
    )

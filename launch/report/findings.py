"""What the curves of a run say in words: known troubles, each found by a simple rule. Pure.

Rules that judge a change compare the mean over the first fifth of a curve with that over the last. Thresholds
are rules of thumb: a finding is a reason to look, not a proof.
"""

import math
from collections.abc import Callable, Sequence
from statistics import StatisticsError, correlation, fmean, median
from typing import Any, NamedTuple

from launch.report.read import columns
from launch.report.trends import FEWEST, Values, ends, error_of_change, peak, running_means
from step3_ppo.advice import FAR, IDLE, JUMP, MOST_RISE

ERRORS = 3  # a change by more standard errors than this is not noise
LONGER, TOGETHER = 1.3, 0.7  # growth of length, and correlation with the score, from which they rise as one
MORE_REPEATED = 0.1  # rise of the share of n-grams that are repeated
LEAST_ENTROPY, LEAST_VARIETY = 0.1, 0.5  # of what it was at the start
SOME_EOS, NO_EOS = 0.1, 0.01  # shares of responses that end by themselves
MOST_CLIPPED = 0.3  # share of tokens, in a quarter of the steps or more
LARGEST_RISE = 0.05  # of the evaluation loss, relative to its lowest


class Finding(NamedTuple):
    """Something that stands out, with its figures, and what to try."""

    found: str
    advice: str


def findings(lines: Sequence[dict[str, Any]]) -> list[Finding]:
    """All that stands out in the lines of metrics.jsonl."""
    checks: list[tuple[Callable[..., Finding | None], list[tuple[str, ...]]]] = [
        (over_optimisation, [("step", "eval/score", "eval/gold")]),
        (length_hack, [("reward/mean", "response/length")]),
        (repetition, [("response/repeated_3",), ("response/distinct_2",)]),
        (entropy_collapse, [("policy/entropy",)]),
        (variety_collapse, [("eval/distinct_2",)]),
        (no_endings, [("response/eos_rate",)]),
        (kl_too_small, [("kl/mean", "reward/mean")]),
        (kl_jump, [("step", "kl/mean")]),
        (kl_too_large, [("step", "kl/mean")]),
        (blind_critic, [("value/explained_var",)]),
        (clipped_updates, [("policy/clip_fraction",)]),
        (overfitting, [("step", "train/loss"), ("step", "eval/loss")]),
    ]
    found = []
    for check, groups in checks:
        values = [column for names in groups for column in columns(lines, *names)]
        found += filter(None, [check(*values)])
    return found


def over_optimisation(steps: Values, scores: Values, golds: Values) -> Finding | None:
    """The proxy rises while gold falls (Gao et al. 2023, section 3): by running means, after gold's peak."""
    if not golds:
        return None
    gold, score = running_means(golds), running_means(scores)
    top = gold.index(max(gold))
    if gold[top] - gold[-1] <= ERRORS * error_of_change(golds) or score[-1] <= score[top]:
        return None
    return Finding(
        f"Over-optimisation: around step {steps[peak(golds)]} gold was {gold[top]:.3g} and fell to"
        f" {gold[-1]:.3g}, while the score rose from {score[top]:.3g} to {score[-1]:.3g}.",
        "--best_metric eval/gold with --early_stopping; a higher --kl_coef; several reward models with"
        " --reward_combine min; new preferences between answers of this policy.",
    )


def length_hack(scores: Values, lengths: Values) -> Finding | None:
    """Scores that rise together with the length of responses."""
    (low, high), (short, long) = ends(scores), ends(lengths)
    try:
        together = correlation(scores, lengths)
    except StatisticsError:  # fewer than two values, or one of the two is constant
        return None
    if high <= low or long < LONGER * short or together < TOGETHER:
        return None
    return Finding(
        f"Score and length rise together: {low:.3g} to {high:.3g}, and {short:.0f} to {long:.0f} tokens,"
        f" with a correlation of {together:.2f}.",
        "see whether the samples say more or only go on; --length_penalty; launch/evaluate_reward.sh shows"
        " how far scores follow length.",
    )


def repetition(repeated: Values, distinct: Values) -> Finding | None:
    """Responses that repeat themselves more than at the start."""
    (few, many), (rich, poor) = ends(repeated), ends(distinct)
    if not (many - few > MORE_REPEATED or rich - poor > MORE_REPEATED):
        return None
    seen = [f"response/repeated_3 went from {few:.1%} to {many:.1%}"] * bool(repeated)
    seen += [f"response/distinct_2 from {rich:.1%} to {poor:.1%}"] * bool(distinct)
    return Finding(
        f"Repetition: {', '.join(seen)}.", "--repetition_penalty; a higher --kl_coef; look at the samples."
    )


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
    """A policy that moves too fast."""
    near = [
        (kls[later] - kls[first], first, later)
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
        "a higher --kl_coef, or --kl_controller adaptive; a lower --actor_learning_rate.",
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

"""Reward hacking: scores that rise with length, repetition, or one form of answer, or while gold falls. Pure.

Thresholds are rules of thumb, well outside the noise of healthy runs.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import StatisticsError, correlation

from launch.report.read import Line
from launch.report.rule import Finding
from launch.report.trends import ERRORS, FEWEST, Values, ends, error_of_change, peak, running_means

LONGER, CORRELATED = 1.3, 0.7  # growth of length, and its correlation with the score
MORE_REPEATED, MOST_REPEATED = 0.1, 0.5  # rise and level of the share of repeated n-grams
LEAST_FALL = 0.05  # of gold, as a share of the first, with few evaluations
OPENING = 3  # words; fewer are common to different answers
MORE_ALIKE = 0.5  # rise of the share of the most common opening: with four samples, from one to three
LEAST_DISTINCT = 0.6  # of distinct-2 over all answers, relative to the start; longer answers give about 0.8
FEWEST_SAMPLES = 4  # of an evaluation; two or three can begin alike by chance


def over_optimisation(steps: Values, scores: Values, golds: Values) -> Finding | None:
    """Gold falls from its peak while the proxy rises, by running means (Gao et al. 2023, section 3)."""
    gold, score = running_means(golds), running_means(scores)
    top = gold.index(max(gold))
    if gold[top] - gold[-1] <= ERRORS * error_of_change(golds) or score[-1] <= score[top]:
        return None
    return Finding(
        f"Over-optimisation: gold peaked at {gold[top]:.3g} around step {steps[peak(golds)]} and fell to"
        f" {gold[-1]:.3g}, while the score rose from {score[top]:.3g} to {score[-1]:.3g}.",
        "--best_metric eval/gold with --early_stopping; a higher --kl_coef; several reward models with"
        " --reward_combine min; new preferences between answers of this policy.",
    )


def falling_gold(steps: Values, scores: Values, golds: Values) -> Finding | None:
    """Gold falls together with the score, or at each of a few evaluations."""
    if len(golds) >= FEWEST:
        gold, score = running_means(golds), running_means(scores)
        top = gold.index(max(gold))
        falls = gold[top] - gold[-1] > ERRORS * error_of_change(golds) and score[-1] <= score[top]
    else:
        falls = all(a > b for a, b in pairwise(golds)) and golds[0] - golds[-1] > LEAST_FALL * abs(golds[0])
    if not falls:
        return None
    return Finding(
        f"Falling gold: eval/gold went from {max(golds):.3g} to {golds[-1]:.3g} at step {steps[-1]},"
        f" eval/score from {scores[0]:.3g} to {scores[-1]:.3g}.",
        "--best_metric eval/gold; a lower --actor_learning_rate; a higher --kl_coef.",
    )


def length_hack(scores: Values, lengths: Values) -> Finding | None:
    """Scores that rise with the length of responses."""
    (low, high), (short, long) = ends(scores), ends(lengths)
    try:
        r = correlation(scores, lengths)
    except StatisticsError:  # fewer than two values, or a constant
        return None
    if high <= low or long < LONGER * short or r < CORRELATED:
        return None
    return Finding(
        f"Score and length rise together: {low:.3g} to {high:.3g}, and {short:.0f} to {long:.0f} tokens,"
        f" with a correlation of {r:.2f}.",
        "check whether longer samples are better; --length_penalty; launch/evaluate_reward.sh shows how much"
        " scores depend on length.",
    )


def repetition(repeated: Values, distinct: Values, scores: Values) -> Finding | None:
    """Responses that repeat themselves more than at the start, with or without a rise of the score."""
    (few, many), (rich, poor), (low, high) = ends(repeated), ends(distinct), ends(scores)
    if not (many - few > MORE_REPEATED or rich - poor > MORE_REPEATED or many > MOST_REPEATED):
        return None
    facts = [f"response/repeated_3 went from {few:.1%} to {many:.1%}"] * bool(repeated)
    facts += [f"response/distinct_2 from {rich:.1%} to {poor:.1%}"] * bool(distinct)
    if high > low:
        facts.append(f"while the score rose from {low:.3g} to {high:.3g}")
    return Finding(
        f"Repetition: {', '.join(facts)}.",
        "look at the samples; --repetition_penalty; a higher --kl_coef."
        if high > low
        else "the score does not reward it: a lower --actor_learning_rate; a higher --kl_coef.",
    )


def format_hack(samples: Sequence[Line], scores: Values) -> Finding | None:
    """Answers that become alike from the first evaluation to the last, while the score rises.

    samples: records of samples.jsonl, with the same prompts at each step; scores: of the evaluations.
    """
    (start, before), (end, after) = _first_and_last(samples)
    (low, high) = ends(scores)
    if min(len(before), len(after)) < FEWEST_SAMPLES or start == end or not high > low:
        return None
    (_, few, rich), (opening, many, poor) = _likeness(before), _likeness(after)
    if many - few < MORE_ALIKE and poor >= LEAST_DISTINCT * rich:
        return None
    return Finding(
        f"Answers become alike while the score rises from {low:.3g} to {high:.3g}: {many:.0%} of the samples"
        f" at step {end} begin with “{opening}” (at step {start}, at most {few:.0%} began alike), and"
        f" distinct-2 over all samples went from {rich:.0%} to {poor:.0%}.",
        "check whether the reward model prefers this form for any prompt; a higher --kl_coef; --entropy_coef;"
        " preferences in which this form is rejected.",
    )


def missing_samples(samples: Sequence[Line]) -> str:
    """Why the samples are not enough to check whether answers become alike; empty when they are."""
    (start, before), (end, after) = _first_and_last(samples)
    if min(len(before), len(after)) < FEWEST_SAMPLES:
        return f"an evaluation has fewer than {FEWEST_SAMPLES} samples: a higher --num_samples"
    return "all samples are from one evaluation: a lower --eval_steps" if start == end else ""


def _first_and_last(samples: Sequence[Line]) -> list[tuple[int, list[str]]]:
    """Step and responses of the first and the last evaluation."""
    steps = sorted({sample["step"] for sample in samples}) or [0]
    return [
        (step, [sample["response"] for sample in samples if sample["step"] == step])
        for step in (steps[0], steps[-1])
    ]


def _likeness(responses: Sequence[str]) -> tuple[str, float, float]:
    """The most common opening, its share, and distinct-2 over all responses (Li et al. 2016)."""
    words = [response.split() for response in responses]
    ((opening, count),) = Counter(" ".join(one[:OPENING]) for one in words).most_common(1)
    pairs = [pair for one in words for pair in pairwise(one)]
    return opening, count / len(words), len(set(pairs)) / max(1, len(pairs))

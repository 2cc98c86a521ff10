"""Scores that rise for a wrong reason: length, repetition, one form of answer, or while gold falls. Pure.

Thresholds are rules of thumb, far enough from what healthy runs show that noise does not reach them.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import StatisticsError, correlation

from launch.report.read import Line
from launch.report.rule import Finding
from launch.report.trends import ERRORS, FEWEST, Values, ends, error_of_change, peak, running_means

LONGER, TOGETHER = 1.3, 0.7  # growth of length, and correlation with the score, from which they rise as one
MORE_REPEATED, MOST_REPEATED = 0.1, 0.5  # rise and level of the share of n-grams that are repeated
LEAST_FALL = 0.05  # of gold, as a share of the first, where there are few evaluations
OPENING = 3  # words: fewer are common to answers of any kind
MORE_ALIKE = 0.5  # rise of the share of the commonest opening: of four samples, from one to three
LEAST_TOGETHER = 0.6  # of distinct-2 over all answers at the start; longer answers alone leave some 0.8
FEWEST_SAMPLES = 4  # of an evaluation; two or three begin alike by chance


def over_optimisation(steps: Values, scores: Values, golds: Values) -> Finding | None:
    """The proxy rises while gold falls (Gao et al. 2023, section 3): by running means, after gold's peak."""
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


def falling_gold(steps: Values, scores: Values, golds: Values) -> Finding | None:
    """Gold that falls together with the score, or from one to the next of a few evaluations."""
    if len(golds) >= FEWEST:
        gold, score = running_means(golds), running_means(scores)
        top = gold.index(max(gold))
        falls = gold[top] - gold[-1] > ERRORS * error_of_change(golds) and score[-1] <= score[top]
    else:
        falls = all(a > b for a, b in pairwise(golds)) and golds[0] - golds[-1] > LEAST_FALL * abs(golds[0])
    if not falls:
        return None
    return Finding(
        f"Gold falls: eval/gold went from {max(golds):.3g} to {golds[-1]:.3g} at step {steps[-1]}, eval/score"
        f" from {scores[0]:.3g} to {scores[-1]:.3g}.",
        "--best_metric eval/gold; a lower --actor_learning_rate; a higher --kl_coef.",
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


def repetition(repeated: Values, distinct: Values, scores: Values) -> Finding | None:
    """Responses that repeat themselves more than at the start, and whether that is what scores reward."""
    (few, many), (rich, poor), (low, high) = ends(repeated), ends(distinct), ends(scores)
    if not (many - few > MORE_REPEATED or rich - poor > MORE_REPEATED or many > MOST_REPEATED):
        return None
    seen = [f"response/repeated_3 went from {few:.1%} to {many:.1%}"] * bool(repeated)
    seen += [f"response/distinct_2 from {rich:.1%} to {poor:.1%}"] * bool(distinct)
    if high > low:
        seen.append(f"while the score rose from {low:.3g} to {high:.3g}")
    return Finding(
        f"Repetition: {', '.join(seen)}.",
        "look at the samples; --repetition_penalty; a higher --kl_coef."
        if high > low
        else "the score did not ask for it: a lower --actor_learning_rate; a higher --kl_coef.",
    )


def format_hack(samples: Sequence[Line], scores: Values) -> Finding | None:
    """One form of answer, or one answer, to every prompt: from the first evaluation to the last.

    samples: records of samples.jsonl, of as many prompts at each step; scores: of the evaluations.
    """
    (start, before), (end, after) = _first_and_last(samples)
    (low, high) = ends(scores)
    if min(len(before), len(after)) < FEWEST_SAMPLES or start == end or not high > low:
        return None
    (_, few, rich), (opening, many, poor) = _likeness(before), _likeness(after)
    if many - few < MORE_ALIKE and poor >= LEAST_TOGETHER * rich:
        return None
    return Finding(
        f"Answers become alike while the score rises from {low:.3g} to {high:.3g}: {many:.0%} of the samples"
        f" at step {end} begin with “{opening}” (at step {start}, {few:.0%} began alike at most), and their"
        f" distinct-2, over all of them together, went from {rich:.0%} to {poor:.0%}.",
        "see whether this form pleases the reward model whatever is asked; a higher --kl_coef;"
        " --entropy_coef; preferences in which it loses.",
    )


def lack_of_samples(samples: Sequence[Line]) -> str:
    """Why samples do not tell whether answers become alike; empty when they do."""
    (start, before), (end, after) = _first_and_last(samples)
    if min(len(before), len(after)) < FEWEST_SAMPLES:
        return f"an evaluation has fewer than {FEWEST_SAMPLES} samples: a higher --num_samples"
    return "all samples are of one evaluation: a lower --eval_steps" if start == end else ""


def _first_and_last(samples: Sequence[Line]) -> list[tuple[int, list[str]]]:
    """The steps of the first and the last evaluation, and the responses there."""
    steps = sorted({sample["step"] for sample in samples}) or [0]
    return [
        (step, [sample["response"] for sample in samples if sample["step"] == step])
        for step in (steps[0], steps[-1])
    ]


def _likeness(responses: Sequence[str]) -> tuple[str, float, float]:
    """The commonest opening, its share, and distinct-2 of all responses together (Li et al. 2016)."""
    words = [response.split() for response in responses]
    ((opening, count),) = Counter(" ".join(one[:OPENING]) for one in words).most_common(1)
    pairs = [pair for one in words for pair in pairwise(one)]
    return opening, count / len(words), len(set(pairs)) / max(1, len(pairs))

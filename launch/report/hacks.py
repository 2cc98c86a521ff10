"""Scores that rise for a wrong reason: length, repetition, one form of answer, or while gold falls. Pure.

Thresholds are rules of thumb, far enough from what healthy runs show that noise does not reach them.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import StatisticsError, correlation
from typing import NamedTuple

from launch.report.read import Line, columns
from launch.report.trends import FEWEST, Values, ends, error_of_change, peak, running_means

ERRORS = 3  # a change by more standard errors than this is not noise
LONGER, TOGETHER = 1.3, 0.7  # growth of length, and correlation with the score, from which they rise as one
MORE_REPEATED = 0.1  # rise of the share of n-grams that are repeated
OPENING = 3  # words: fewer are common to answers of any kind
MORE_ALIKE = 0.5  # rise of the share of the commonest opening: of four samples, from one to three
LEAST_TOGETHER = 0.6  # of distinct-2 over all answers at the start; longer answers alone leave some 0.8
FEWEST_SAMPLES = 4  # of an evaluation; two or three begin alike by chance


class Finding(NamedTuple):
    """Something that stands out, with its figures, and what to try."""

    found: str
    advice: str


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


def repetition(repeated: Values, distinct: Values, scores: Values) -> Finding | None:
    """Responses that repeat themselves more than at the start, and whether that is what scores reward."""
    (few, many), (rich, poor), (low, high) = ends(repeated), ends(distinct), ends(scores)
    if not (many - few > MORE_REPEATED or rich - poor > MORE_REPEATED):
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


def not_looked_at(lines: Sequence[Line], samples: Sequence[Line]) -> list[str]:
    """What no rule can see in a run of step 3, and which option would show it."""
    if not columns(lines, "reward/mean", "kl/mean")[0]:
        return []
    if not columns(lines, "eval/score")[0]:
        unseen, reason = "over-optimisation and answers that become alike", "there are no evaluations"
        return [f"Not looked at: {unseen}, as {reason}: --eval_fraction or --eval_data, and --eval_steps."]
    said = []
    if not (golds := columns(lines, "eval/gold")[0]):
        told = "gold was not measured: --gold_reward_model or --gold_function measures it"
        said.append(f"over-optimisation, as {told}.")
    elif len(golds) < FEWEST:
        told = f"gold was measured {len(golds)} times, of the {FEWEST} that tell it from noise"
        said.append(f"over-optimisation, as {told}: a lower --eval_steps.")
    (start, before), (end, after) = _first_and_last(samples)
    if min(len(before), len(after)) < FEWEST_SAMPLES:
        told = f"an evaluation kept fewer than {FEWEST_SAMPLES} samples: a higher --num_samples"
        said.append(f"answers that become alike, as {told}.")
    elif start == end:
        said.append("answers that become alike, as samples are of one evaluation: a lower --eval_steps.")
    return [f"Not looked at: {one}" for one in said]


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

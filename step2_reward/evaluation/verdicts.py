"""Problems of a reward model, detected from its metrics and training curves. Pure."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from step2_reward.evaluation.figures import SATURATED

COIN_TOSS = math.log(2)  # nats per pair
LOWEST_ACCURACY, HIGHEST_ACCURACY = 0.65, 0.9  # raters agree in 73 to 77 % of pairs: Ouyang et al. 2022, 3.4
WIDEST_INTERVAL = 0.1  # width of the 95 % interval; that of about 350 pairs
LEAST_CONFIDENCE = 0.51  # mean; below it every prediction is close to a coin toss
MOST_SATURATED = 0.25  # share of pairs
STRONGEST_CORRELATION = 0.5  # of score and length, over responses to different prompts
MOST_BY_LENGTH = 0.75  # share of pairs where the longer response scores higher (or lower); chance is 0.5
LARGEST_RISE = 0.05  # of the evaluation loss, relative to its lowest


class Verdict(NamedTuple):
    """A problem with its metric, and what to try."""

    found: str
    advice: str


def detect_problems(
    metrics: dict[str, Any], history: Sequence[dict[str, Any]] = (), is_ensemble: bool = False
) -> list[Verdict]:
    """Detect problems from the metrics of `reward_metrics` and, if given, the lines of metrics.jsonl.

    is_ensemble: skips the checks of probabilities, which need raw scores.
    """
    accuracy, confidence = metrics["accuracy"], metrics["prediction"]["confidence"]
    log_loss = metrics["prediction"]["log_loss"]
    right, interval = accuracy["accuracy"], f"95% interval {accuracy['low']:.1%} to {accuracy['high']:.1%}"
    saturation, agreement = metrics["prediction"]["saturation"], metrics["agreement"]["mean"]
    raters = "" if agreement is None else f"; raters agree with their majority in {agreement:.1%}"
    by_length, overfitting = _by_length(metrics["length"]), _overfitting(history)
    checks = [
        (accuracy["high"] - accuracy["low"] > WIDEST_INTERVAL,
         f"Accuracy is uncertain: {accuracy['pairs']} pairs, {interval}.",
         "evaluate more held-out pairs before acting on the rest; 1000 pairs give ±3 points."),
        (right < LOWEST_ACCURACY,
         f"Low accuracy, from noisy labels or too little training: {right:.1%} ({interval}){raters}.",
         "while train/loss falls, a higher --learning_rate or --num_train_epochs; else better labels."),
        (right > HIGHEST_ACCURACY,
         f"Accuracy too high for preferences, from a trivial signal or a leak: {right:.1%} ({interval}).",
         "look for these prompts in the training data, and for a feature that only chosen responses have."),
        (not is_ensemble and confidence < LEAST_CONFIDENCE,
         f"Collapsed scores: mean confidence is {confidence:.2%}; that of a coin toss is 50%.",
         "a higher --learning_rate or --num_train_epochs; a lower --centre_coef or --label_smoothing."),
        (not is_ensemble and log_loss >= COIN_TOSS,
         f"No better than a coin toss: the log-loss is {log_loss:.3f} nats per pair; that of a coin toss is"
         f" ln 2 = {COIN_TOSS:.3f}.",
         "if accuracy is high, the model is overconfident: --label_smoothing, a lower --learning_rate, fewer"
         " --num_train_epochs; else a higher --learning_rate or better labels."),
        (not is_ensemble and saturation > MOST_SATURATED,
         f"Saturated scores: {saturation:.1%} of pairs have a confidence above {SATURATED:.1%}.",
         "--label_smoothing (the share of wrong labels); a lower --learning_rate or --num_train_epochs."),
        (by_length, by_length, "training pairs of similar length, or with a shorter chosen response."),
        (overfitting, overfitting, "--best_metric eval/loss; fewer --num_train_epochs; more data."),
    ]  # fmt: skip
    return [Verdict(text, advice) for is_wrong, text, advice in checks if is_wrong]


def format_verdicts(
    problems: Sequence[Verdict], metrics: dict[str, Any], history: Sequence[dict[str, Any]] = (),
    is_ensemble: bool = False,
) -> str:  # fmt: skip
    """Format two lines per problem, or one line without problems, and list the checks that were skipped."""
    lines = [f"- {verdict.found}\n  Try: {verdict.advice}" for verdict in problems]
    unchecked = []
    if not any(line.get("eval/loss") is not None for line in history):
        unchecked.append("overfitting (no evaluations in metrics.jsonl beside the model)")
    if is_ensemble:
        unchecked.append("confidence and log-loss (an ensemble has no raw scores)")
    if metrics["length"]["prefers_longer"] is None:
        unchecked.append("preference for longer responses (the lengths in each pair are equal)")
    if metrics["agreement"]["mean"] is None:
        unchecked.append("rater agreement (no votes)")
    rest = f"not checked: {', '.join(unchecked)}." if unchecked else ""
    if lines:
        return "\n".join([*lines, *[rest.capitalize()] * bool(rest)])
    return f"No problems detected in {metrics['pairs']} pairs{f'; {rest}' if rest else '.'}"


def _by_length(length: dict[str, Any]) -> str:
    """Describe how scores follow length; empty if they do not. The interval makes it robust to few pairs."""
    pairs, correlation = length["prefers_longer"], length["spearman"] or 0.0
    if pairs and max(pairs["low"], 1 - pairs["high"]) > MOST_BY_LENGTH:
        return (
            f"Scores follow length: the longer response scores higher in {pairs['accuracy']:.1%} of pairs,"
            f" and is chosen in {length['longer_wins']['accuracy']:.1%}."
        )
    is_strong = abs(correlation) > STRONGEST_CORRELATION
    return f"Scores follow length: their rank correlation is {correlation:+.2f}." if is_strong else ""


def _overfitting(history: Sequence[dict[str, Any]]) -> str:
    """Describe the rise of eval/loss above its minimum while train/accuracy did not fall; empty if none.

    Training accuracy is compared over as many lines before the minimum as after it; with the minimum at step
    0, over the two halves of the run.
    """
    losses = [(line["eval/loss"], line["step"]) for line in history if line.get("eval/loss") is not None]
    best, step = min(losses, default=(0.0, 0))
    trained = [line for line in history if line.get("train/accuracy") is not None]
    after = [line["train/accuracy"] for line in trained if line["step"] > step]
    before = [line["train/accuracy"] for line in trained if line["step"] <= step][-len(after) :]
    if not before:
        before, after = after[: len(after) // 2], after[len(after) // 2 :]
    if not (losses and before and after) or losses[-1][0] <= best * (1 + LARGEST_RISE):
        return ""
    rise = f"eval/loss rose from {best:.3f} to {losses[-1][0]:.3f} after step {step}"
    was, now = fmean(before), fmean(after)
    return f"Overfitting: {rise}, train/accuracy from {was:.1%} to {now:.1%}." if now >= was else ""

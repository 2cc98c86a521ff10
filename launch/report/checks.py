"""Problems of training in any stage, and of steps 1 and 2. Pure.

Rules about a change compare the means over the first and the last fifth of a curve; rules about a level use
the last fifth. Thresholds are rules of thumb: a finding is a reason to look, not a proof.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from launch.report.read import Line
from launch.report.rule import Finding
from launch.report.trends import ERRORS, Values, ends, error_of_change

COIN_TOSS = math.log(2)  # preference loss of a random model, nats per pair
LEAST_ACCURACY = 0.55  # of pairs; 0.5 is a coin toss
MEMORISED, LARGEST_GAP = 0.95, 0.15  # training accuracy, and its gap to the held-out accuracy
LARGEST_LOSS = math.log(1000)  # nats per token after training, a perplexity of 1000
LARGEST_RISE = 0.05  # of the evaluation loss, relative to its minimum
LEAST_RISE = 0.01  # of the evaluation loss and of the NLL of chosen responses, relative to step 0
LEAST_FALL = 0.005  # of the evaluation loss, relative to step 0
LARGEST_NORM, EXPLOSION = 100.0, 10.0  # of gradients: level, and growth
MOST_SKIPPED = 0.005  # share of the steps
FEWEST_LOSSES = 10  # training losses needed to say that they do not fall
LEAST_SPREAD = 0.01  # of the scores of a reward model
FURTHEST = 50.0  # log-ratio to the reference, nats per response of the data
MOST_NAMES = 3


def not_finite(lines: Sequence[Line]) -> Finding | None:
    """Metrics that were NaN or infinite; metrics.jsonl has them as null."""
    bad = [(name, line["step"]) for line in lines for name, value in line.items() if value is None]
    if not bad:
        return None
    names = [*dict.fromkeys(name for name, _ in bad)]
    more = f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)
    return Finding(
        f"Values that are not finite: {', '.join(names[:MOST_NAMES])}{more}, in"
        f" {len({step for _, step in bad})} of {len(lines)} logged steps, first at step {bad[0][1]}.",
        "a lower learning rate; a longer --warmup_ratio; bf16 instead of fp16; the records of that step.",
    )


def skipped_updates(steps: Values, skipped: Values) -> Finding | None:
    """Updates skipped because of non-finite gradients."""
    if skipped[-1] <= MOST_SKIPPED * max(steps[-1], 1):
        return None
    return Finding(
        f"Skipped updates: {skipped[-1]:.0f} in {steps[-1]:.0f} steps, because of non-finite gradients.",
        "a lower learning rate; bf16 instead of fp16, which skips some while it adjusts the loss scale.",
    )


def large_gradients(name: str, norms: Values) -> Finding | None:
    """Gradient norms that are huge, or explode."""
    start, end = ends(norms)
    if end <= EXPLOSION or (end <= LARGEST_NORM and end <= EXPLOSION * start):
        return None
    return Finding(
        f"Large gradients: {name} went from {start:.3g} to {end:.3g}, far above the clipping norm.",
        "a lower learning rate; a longer --warmup_ratio; the records of the steps where the norm jumps.",
    )


def zero_rate(rates: Values) -> Finding | None:
    """A learning rate that is 0 in every line."""
    if any(rates):
        return None
    return Finding("The learning rate is 0 in all logged steps.", "a shorter --warmup_ratio; more steps.")


def rising_loss(losses: Values, held_out: Values) -> Finding | None:
    """A training loss that rises, or that stays the same while the held-out loss does too."""
    start, end = ends(losses)
    if end < start:
        return None
    if end - start > ERRORS * error_of_change(losses):
        return Finding(
            f"Diverged: train/loss rose from {start:.4g} to {end:.4g}.",
            "a lower learning rate; a longer --warmup_ratio; the records of the steps where it jumps.",
        )
    change = held_out[-1] - held_out[0] if held_out else 0.0
    if len(losses) < FEWEST_LOSSES or change < 0 or (held_out and change > LEAST_RISE * abs(held_out[0])):
        return None
    return Finding(
        f"Nothing is learnt: train/loss went from {start:.4g} to {end:.4g}.",
        "a higher learning rate (LoRA takes 10 to 100 times that of full training); more steps.",
    )


def high_loss(losses: Values) -> Finding | None:
    """A language model with a huge loss."""
    if (end := ends(losses)[1]) <= LARGEST_LOSS:
        return None
    return Finding(
        f"The model does not fit the data: the loss is {end:.3g} nats per token at the end, a perplexity of"
        f" {math.exp(min(end, 700)):.3g}.",
        "the samples; tokenizer and chat template; a higher learning rate; more steps.",
    )


def overfitting(
    eval_steps: Values, eval_losses: Values, train_steps: Values, train_losses: Values
) -> Finding | None:
    """A held-out loss above its minimum while the training loss fell, compared over as many lines before the
    minimum as after it (over the two halves of the run if the minimum is at step 0). Or a held-out loss that
    rose, or stayed the same, since step 0.
    """
    lowest, best = min(zip(eval_losses, eval_steps, strict=True))
    after = [loss for step, loss in zip(train_steps, train_losses, strict=True) if step > best]
    before = list(train_losses[: len(train_losses) - len(after)])[-len(after) :]
    if not before:
        before, after = after[: len(after) // 2], after[len(after) // 2 :]
    first, last = eval_losses[0], eval_losses[-1]
    is_higher = last > lowest + LARGEST_RISE * abs(lowest)
    if is_higher and before and after and fmean(after) < fmean(before):
        return Finding(
            f"Overfitting: eval/loss rose from {lowest:.3g} at step {best:.0f} to {last:.3g}, while"
            f" train/loss fell from {fmean(before):.3g} to {fmean(after):.3g}.",
            "--best_metric eval/loss; fewer --num_train_epochs; a lower --learning_rate; more data.",
        )
    if is_higher or (eval_steps[0] == 0 and last > first + LEAST_RISE * abs(first)):
        return Finding(
            f"Held-out loss rises: eval/loss went from {lowest:.4g} at step {best:.0f} to {last:.4g}.",
            "a lower --learning_rate; --best_metric eval/loss; training data of the held-out kind.",
        )
    if eval_steps[0] == 0 and last >= first - LEAST_FALL * abs(first):
        return Finding(
            f"Nothing is learnt: eval/loss was {first:.4g} at step 0 and is {last:.4g} at step"
            f" {eval_steps[-1]:.0f}.",
            "a higher --learning_rate (LoRA takes 10 to 100 times that of full training); more steps.",
        )
    return None


def coin_toss(losses: Values, use_margin: bool = False, loss: str = "dpo") -> Finding | None:
    """A preference loss no lower than that of a random model."""
    end = ends(losses)[1]
    if use_margin or loss not in ("dpo", "robust") or end < COIN_TOSS:
        return None
    return Finding(
        f"No better than a coin toss: the loss on held-out pairs is {end:.4g} at the end, and that of a"
        f" model that prefers neither is ln 2 = {COIN_TOSS:.4g}.",
        "with a high accuracy, the model is too sure: a lower --learning_rate, --label_smoothing; else a"
        " higher --learning_rate, more steps, better labels.",
    )


def coin_toss_in_training(losses: Values, held_out: Values, **options: Any) -> Finding | None:
    """The same for the training loss, in a run without evaluations, unless it contains other terms."""
    added = [options.pop(name, 0.0) for name in ("centre_coef", "lm_loss_coef")]
    finding = coin_toss(losses, **options)
    if held_out or not finding or any(added):
        return None
    return finding._replace(problem=finding.problem.replace("held-out pairs", "training pairs"))


def low_accuracy(accuracies: Values) -> Finding | None:
    """Held-out accuracy near chance or below."""
    end = ends(accuracies)[1]
    if end > LEAST_ACCURACY:
        return None
    level = "below chance" if end < 0.5 else "near chance"
    swapped = "check whether labels are swapped; " if end < 0.5 else ""
    return Finding(
        f"Accuracy {level}: {end:.1%} of the held-out pairs are ranked as labelled.",
        f"{swapped}a higher --learning_rate; more steps; better labels.",
    )


def accuracy_gap(held_out: Values, trained: Values) -> Finding | None:
    """Memorised training pairs with a much lower held-out accuracy."""
    (_, in_training), (_, on_held_out) = ends(trained), ends(held_out)
    if in_training < MEMORISED or in_training - on_held_out < LARGEST_GAP:
        return None
    return Finding(
        f"Overfitting: accuracy is {in_training:.1%} in training and {on_held_out:.1%} on held-out pairs.",
        "fewer --num_train_epochs; a lower --learning_rate; --best_metric eval/accuracy; more data.",
    )


def equal_scores(spreads: Values) -> Finding | None:
    """A reward model that gives all responses nearly the same score."""
    if (end := ends(spreads)[1]) >= LEAST_SPREAD:
        return None
    return Finding(
        f"Collapsed scores: scores of held-out chosen responses have a standard deviation of {end:.2g}.",
        "a higher --learning_rate; a lower --centre_coef.",
    )


def unlearning(nlls: Values) -> Finding | None:
    """Chosen responses that become less likely, as rejected ones do. nlls: nats per token."""
    start, end = nlls[0], ends(nlls)[1]
    if not end > start + LEAST_RISE * abs(start):
        return None
    return Finding(
        f"Chosen responses become less likely: eval/nll_chosen rose from {start:.3g} to {end:.3g} nats per"
        " token.",
        "a higher --beta; a lower --learning_rate; --loss cpo; an earlier checkpoint.",
    )


def wrong_side(margins: Values) -> Finding | None:
    """Rejected responses with higher rewards than chosen ones."""
    if (end := ends(margins)[1]) >= 0:
        return None
    return Finding(
        f"Negative margin: eval/margin is {end:.3g} at the end; rejected responses have the higher reward.",
        "check whether labels are swapped; a higher --learning_rate; more steps.",
    )


def far_on_data(log_ratios: Values) -> Finding | None:
    """A policy far from the reference on the responses of the data."""
    end = ends(log_ratios)[1]
    if abs(end) <= FURTHEST:
        return None
    return Finding(
        f"Far from the reference: logratio/mean is {end:.3g} nats per response at the end.",
        "a higher --beta; a lower --learning_rate; fewer --num_train_epochs.",
    )

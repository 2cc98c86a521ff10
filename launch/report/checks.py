"""Problems of training in any stage, and of steps 1 and 2, that take more than one condition. Pure."""

import math
from collections.abc import Sequence
from statistics import fmean

from launch.report.read import Line
from launch.report.rule import Finding
from launch.report.trends import ERRORS, Values, ends, error_of_change

LARGEST_LOSS = math.log(1000)  # nats per token after training, a perplexity of 1000
LARGEST_RISE = 0.05  # of the evaluation loss, relative to its minimum
LEAST_RISE = 0.01  # of the evaluation loss, relative to step 0
LEAST_FALL = 0.005  # of the evaluation loss, relative to step 0
FEWEST_LOSSES = 10  # training losses needed to say that they do not fall
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

"""Problems of step 3 that KL shows, from the reference and within a rollout. Pure. See checks.py."""

from itertools import accumulate
from statistics import median

from launch.report.rule import Finding
from launch.report.trends import ERRORS, Values, ends, error_of_change, large_change
from step3_ppo.kl_advice import FAR, IDLE, JUMP, MOST_RISE

LARGEST_UPDATE = 0.1  # KL of the updates of a rollout, nats per token
RATIO_ERROR = 0.02
MOVED = 1.0  # nats per response, for which a score should have risen


def kl_too_small(kls: Values, rewards: Values) -> Finding | None:
    """A policy that stays where it was, and gains nothing there."""
    (low, high), (_, kl) = ends(rewards), ends(kls)
    if kl >= IDLE or abs(high - low) > ERRORS * error_of_change(rewards):
        return None
    return Finding(
        f"Nothing is learnt: kl/mean is {kl:.2g} nats at the end, and reward/mean went from {low:.3g} to"
        f" {high:.3g}, which is noise.",
        "a lower --kl_coef; a higher --actor_learning_rate; more steps.",
    )


def moved_for_nothing(kls: Values, scores: Values, spreads: Values) -> Finding | None:
    """A policy that moves away, and does not score higher for it: neither beyond noise nor by much."""
    (low, high), (_, kl) = ends(scores), ends(kls)
    is_change = abs(high - low) > ERRORS * error_of_change(scores)
    if kl < MOVED or is_change or high - low > large_change(max(low, high, key=abs), spreads):
        return None
    return Finding(
        f"Moved for nothing: eval/kl is {kl:.3g} nats at the end, and eval/score went from {low:.3g} to"
        f" {high:.3g}.",
        "a lower --actor_learning_rate; larger rollouts; launch/evaluate_reward.sh shows whether scores mean"
        " anything.",
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
        "a higher --kl_coef, or --kl_controller adaptive with a low --kl_target; a lower"
        " --actor_learning_rate, or a longer --warmup_ratio to it.",
    )


def kl_too_large(steps: Values, kls: Values) -> Finding | None:
    """A policy that has left the reference behind."""
    above = [step for step, kl in zip(steps, kls, strict=True) if kl > FAR]
    if not above:
        return None
    return Finding(
        f"Drifted far: kl/mean exceeds {FAR:.0f} nats from step {above[0]} and ends at {kls[-1]:.3g}.",
        "a higher --kl_coef, or --kl_controller adaptive with a --kl_target; the samples before that step.",
    )


def large_updates(kls: Values) -> Finding | None:
    """A policy far from the one that drew the responses."""
    if (often := median(kls)) <= LARGEST_UPDATE:
        return None
    return Finding(
        f"Updates too large: policy/approx_kl has a median of {often:.2g} nats per token.",
        "a lower --actor_learning_rate; fewer --ppo_epochs; a lower --max_update_kl, to end epochs early.",
    )


def wrong_ratio(ratios: Values) -> Finding | None:
    """Sampling and training that disagree about the policy."""
    if (error := median(abs(ratio - 1) for ratio in ratios)) <= RATIO_ERROR:
        return None
    return Finding(
        f"Sampling and training disagree: policy/ratio is off 1 by {error:.2g} at the first minibatch.",
        "fp32 or bf16 for both; a model without dropout or other noise; a supported family.",
    )

"""Problems of step 3 seen in the KL to the reference and to the rollout policy. Pure. See checks.py."""

from itertools import accumulate
from statistics import median

from launch.report.rule import Finding
from launch.report.trends import ERRORS, Values, ends, error_of_change, large_change
from step3_ppo.kl_advice import FAR, IDLE, JUMP, MOST_RISE

LARGEST_UPDATE = 0.1  # KL of the updates of a rollout, nats per token
RATIO_ERROR = 0.02
MOVED = 1.0  # KL in nats per response with which the score should have risen


def kl_too_small(kls: Values, rewards: Values) -> Finding | None:
    """A policy that stays at the reference, with a flat reward."""
    (low, high), (_, kl) = ends(rewards), ends(kls)
    if kl >= IDLE or abs(high - low) > ERRORS * error_of_change(rewards):
        return None
    return Finding(
        f"Nothing is learnt: kl/mean is {kl:.2g} nats at the end, and reward/mean went from {low:.3g} to"
        f" {high:.3g}, within noise.",
        "a lower --kl_coef; a higher --actor_learning_rate; more steps.",
    )


def kl_without_gain(kls: Values, scores: Values, spreads: Values) -> Finding | None:
    """KL grows, and the held-out score does not rise, neither beyond noise nor by much."""
    (low, high), (_, kl) = ends(scores), ends(kls)
    is_change = abs(high - low) > ERRORS * error_of_change(scores)
    if kl < MOVED or is_change or high - low > large_change(max(low, high, key=abs), spreads):
        return None
    return Finding(
        f"KL without gain: eval/kl is {kl:.3g} nats at the end, but eval/score went from {low:.3g} to"
        f" {high:.3g}.",
        "a lower --actor_learning_rate; larger rollouts; check the reward model with"
        " launch/evaluate_reward.sh.",
    )


def kl_jump(steps: Values, kls: Values) -> Finding | None:
    """KL rises fast above its previous maximum. Swings around a level do not count."""
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
        f"KL jump: kl/mean went from {max(kls[first], 0):.2f} to {kls[later]:.2f} nats between steps"
        f" {steps[first]} and {steps[later]}.",
        "a higher --kl_coef, or --kl_controller adaptive with a low --kl_target; a lower"
        " --actor_learning_rate, or a longer --warmup_ratio.",
    )


def kl_too_large(steps: Values, kls: Values) -> Finding | None:
    """A policy far from the reference."""
    above = [step for step, kl in zip(steps, kls, strict=True) if kl > FAR]
    if not above:
        return None
    return Finding(
        f"Large KL: kl/mean exceeds {FAR:.0f} nats from step {above[0]} and ends at {kls[-1]:.3g}.",
        "a higher --kl_coef, or --kl_controller adaptive with a --kl_target; the samples before that step.",
    )


def large_updates(kls: Values) -> Finding | None:
    """A policy far from the rollout policy."""
    if (typical := median(kls)) <= LARGEST_UPDATE:
        return None
    return Finding(
        f"Updates too large: policy/approx_kl has a median of {typical:.2g} nats per token.",
        "a lower --actor_learning_rate; fewer --ppo_epochs; a lower --max_update_kl, to end epochs early.",
    )


def wrong_ratio(ratios: Values) -> Finding | None:
    """Different log-probabilities in sampling and in training."""
    if (error := median(abs(ratio - 1) for ratio in ratios)) <= RATIO_ERROR:
        return None
    return Finding(
        f"Sampling and training disagree: policy/ratio differs from 1 by {error:.2g} at the first minibatch.",
        "fp32 or bf16 for both; a model without dropout or other noise; a supported family.",
    )

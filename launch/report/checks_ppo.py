"""Problems of step 3 that take more than one condition. Pure."""

from itertools import accumulate
from statistics import median

from launch.report.rule import Finding
from launch.report.trends import FEWEST, Curve, Values, ends, large_change, peak, running_means
from step3_ppo.kl_advice import FAR, JUMP, MOST_RISE

MOST_CUT, NO_EOS, SOME_EOS = 0.25, 0.01, 0.1  # shares of responses
RATIO_ERROR = 0.02
WORST_CRITIC = -1.0  # explained variance that is reported even for few values


def truncation(rates: Values, missing_eos_penalty: float | None = None) -> Finding | None:
    """Responses truncated at --max_response_length.

    Without --missing_eos_penalty, truncation is intended: then only responses that used to end count.
    """
    start, end = ends(rates)
    is_intended = missing_eos_penalty == 0
    if end >= 1 - MOST_CUT or (is_intended and not (start >= 1 - MOST_CUT and end < NO_EOS)):
        return None
    if start > SOME_EOS and end < NO_EOS:
        text = f"Responses no longer end: response/eos_rate fell from {start:.1%} to {end:.1%}."
    else:
        text = f"Truncated responses: response/eos_rate is {end:.1%} at the end ({start:.1%} at the start)."
    return Finding(
        text,
        "a longer --max_response_length; a higher --missing_eos_penalty; --length_penalty; demonstrations"
        " that end in EOS." + " If truncation is intended, --missing_eos_penalty 0." * (not is_intended),
    )


def large_penalties(penalties: Values, spreads: Values, normalise_scores: str = "off") -> Finding | None:
    """Penalties at least as large as the spread of the scores."""
    (_, penalty), (_, spread) = ends(penalties), ends(spreads)
    spread = 1.0 if normalise_scores == "sum" else spread
    if penalty <= 0 or penalty < spread:
        return None
    return Finding(
        f"Penalties dominate: reward/penalty is {penalty:.3g} at the end; scores have a standard deviation of"
        f" {spread:.3g}.",
        "a longer --max_response_length; a lower --missing_eos_penalty, --length_penalty or"
        " --repetition_penalty; --normalise_scores sum.",
    )


def falling_score(steps: Values, scores: Values, spreads: Values) -> Finding | None:
    """Held-out scores below their peak, beyond noise or, with few evaluations, by a share of the spread."""
    means = running_means(scores)
    top, last = max(means), means[-1]
    is_long = len(scores) >= FEWEST
    noise = Curve(scores).noise if is_long else large_change(top, spreads)
    if top - last <= noise:
        return None
    step = steps[peak(scores)]
    return Finding(
        f"Falling score: eval/score was {top:.3g} around step {step:.0f} and is {last:.3g} at the end.",
        "--best_metric eval/score; a lower --actor_learning_rate; a higher --kl_coef; fewer --ppo_epochs.",
    )


def blind_critic(explained: Values) -> Finding | None:
    """A critic worse than a constant prediction, by the median over the second half."""
    later = median(explained[len(explained) // 2 :])
    if later >= (0 if len(explained) >= FEWEST else WORST_CRITIC):
        return None
    return Finding(
        f"The critic does not learn: value/explained_var has a median of {later:.2f} in the second half."
        " Below 0, it predicts worse than a constant.",
        "a higher --critic_learning_rate; --critic_warmup_steps; --normalise_scores sum; larger rollouts.",
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


def wrong_ratio(ratios: Values) -> Finding | None:
    """Different log-probabilities in sampling and in training."""
    if (error := median(abs(ratio - 1) for ratio in ratios)) <= RATIO_ERROR:
        return None
    return Finding(
        f"Sampling and training disagree: policy/ratio differs from 1 by {error:.2g} at the first minibatch.",
        "fp32 or bf16 for both; a model without dropout or other noise; a supported family.",
    )

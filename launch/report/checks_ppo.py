"""Problems of step 3: policy, critic, scores and responses. Pure. See checks.py."""

from statistics import median

from launch.report.rule import Finding
from launch.report.trends import (
    ERRORS,
    FEWEST,
    Values,
    ends,
    error_of_change,
    large_change,
    peak,
    running_means,
)

LEAST_ENTROPY, LEAST_DIVERSITY = 0.1, 0.5  # relative to the start
NO_ENTROPY, RANDOM = 0.05, 2.0  # nats per token; growth of entropy
LEAST_DISTINCT = 0.3  # share of distinct pairs of tokens within a response
MOST_CUT, NO_EOS, SOME_EOS = 0.25, 0.01, 0.1  # shares of responses
MOST_CLIPPED = 0.3  # share of tokens, in at least a quarter of the steps
MOST_CLIPPED_SCORES = 0.2
WORST_CRITIC = -1.0  # explained variance that is reported even for few values
LEAST_SPREAD = 1e-3  # of scores
SHORT = 0.3  # relative to the length at the start
FORGOTTEN = 0.05  # relative rise of the loss on --ptx_data


def entropy_collapse(entropies: Values) -> Finding | None:
    """Entropy that collapses, or explodes."""
    start, end = ends(entropies)
    if end > RANDOM * start and end > start + 1:
        return Finding(
            f"Rising entropy: policy/entropy went from {start:.3g} to {end:.3g} nats per token.",
            "a lower --entropy_coef; a higher --kl_coef; a lower --actor_learning_rate.",
        )
    if not (end < LEAST_ENTROPY * start or end < NO_ENTROPY):
        return None
    return Finding(
        f"Collapsed entropy: policy/entropy went from {start:.3g} to {end:.3g} nats per token.",
        "--entropy_coef; a higher --kl_coef; a lower --actor_learning_rate.",
    )


def diversity_collapse(distinct: Values) -> Finding | None:
    """Held-out responses that repeat pairs of tokens."""
    start, end = ends(distinct)
    if not (end < LEAST_DIVERSITY * start or end < LEAST_DISTINCT):
        return None
    return Finding(
        f"Collapsed diversity: eval/distinct_2 went from {start:.1%} to {end:.1%}.",
        "look at the samples; a higher --kl_coef; a lower --actor_learning_rate; an earlier checkpoint.",
    )


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


def near_limit(
    lengths: Values, rates: Values, max_response_length: int = 0, missing_eos_penalty: float | None = None
) -> Finding | None:
    """Responses that end just below --max_response_length; see `truncation` for truncated ones."""
    end, ended = ends(lengths)[1], ends(rates)[1]
    is_cut = missing_eos_penalty == 0 or ended < 1 - MOST_CUT
    if is_cut or not max_response_length or end < 0.95 * max_response_length:
        return None
    return Finding(
        f"Length at the limit: response/length is {end:.0f} tokens at the end, of --max_response_length"
        f" {max_response_length}.",
        "a longer --max_response_length; --length_penalty; a higher --missing_eos_penalty.",
    )


def short_responses(lengths: Values) -> Finding | None:
    """Responses that become much shorter."""
    start, end = ends(lengths)
    if end >= SHORT * start:
        return None
    return Finding(
        f"Responses shrink: response/length went from {start:.0f} to {end:.0f} tokens.",
        "look at the samples; a lower --length_penalty or --missing_eos_penalty; a higher --kl_coef.",
    )


def large_penalties(penalties: Values, spreads: Values, normalise_scores: bool = False) -> Finding | None:
    """Penalties at least as large as the spread of the scores."""
    (_, penalty), (_, spread) = ends(penalties), ends(spreads)
    spread = 1.0 if normalise_scores else spread
    if penalty <= 0 or penalty < spread:
        return None
    return Finding(
        f"Penalties dominate: reward/penalty is {penalty:.3g} at the end; scores have a standard deviation of"
        f" {spread:.3g}.",
        "a longer --max_response_length; a lower --missing_eos_penalty, --length_penalty or"
        " --repetition_penalty; --normalise_scores.",
    )


def clipped_scores(shares: Values) -> Finding | None:
    """Scores beyond --score_clip."""
    if (end := ends(shares)[1]) <= MOST_CLIPPED_SCORES:
        return None
    return Finding(
        f"Clipped scores: {end:.0%} of scores exceed --score_clip at the end.",
        "a higher --score_clip; --normalise_scores.",
    )


def equal_scores(spreads: Values) -> Finding | None:
    """Scores without differences."""
    if (end := ends(spreads)[1]) >= LEAST_SPREAD:
        return None
    return Finding(
        f"Equal scores: reward/std is {end:.2g} at the end, which leaves nothing to learn from.",
        "look at the samples; a reward that distinguishes them; a higher --temperature.",
    )


def falling_score(steps: Values, scores: Values, spreads: Values) -> Finding | None:
    """Held-out scores below their peak, beyond noise or, with few evaluations, by a share of the spread."""
    means = running_means(scores)
    top, last = max(means), means[-1]
    is_long = len(scores) >= FEWEST
    noise = ERRORS * error_of_change(scores) if is_long else large_change(top, spreads)
    if top - last <= noise:
        return None
    step = steps[peak(scores)]
    return Finding(
        f"Falling score: eval/score was {top:.3g} around step {step:.0f} and is {last:.3g} at the end.",
        "--best_metric eval/score; a lower --actor_learning_rate; a higher --kl_coef; fewer --ppo_epochs.",
    )


def falling_reward(rewards: Values) -> Finding | None:
    """Training scores lower than at the start."""
    start, end = ends(rewards)
    if start - end <= ERRORS * error_of_change(rewards):
        return None
    return Finding(
        f"Falling score: reward/mean went from {start:.3g} to {end:.3g}.",
        "a lower --actor_learning_rate; a higher --kl_coef; fewer --ppo_epochs; smaller penalties.",
    )


def blind_critic(explained: Values) -> Finding | None:
    """A critic worse than a constant prediction, by the median over the second half."""
    later = median(explained[len(explained) // 2 :])
    if later >= (0 if len(explained) >= FEWEST else WORST_CRITIC):
        return None
    return Finding(
        f"The critic does not learn: value/explained_var has a median of {later:.2f} in the second half."
        " Below 0, it predicts worse than a constant.",
        "a higher --critic_learning_rate; --critic_warmup_steps; --normalise_scores; larger rollouts.",
    )


def clipped_updates(fractions: Values) -> Finding | None:
    """Updates with a large share of clipped tokens."""
    if (quartile := sorted(fractions)[len(fractions) * 3 // 4]) <= MOST_CLIPPED:
        return None
    return Finding(
        f"Updates too large: policy/clip_fraction is {quartile:.2f} or more in a quarter of the steps.",
        "a lower --actor_learning_rate; fewer --ppo_epochs; a larger --global_batch_size.",
    )


def forgetting(losses: Values) -> Finding | None:
    """A rising loss on demonstrations, despite PPO-ptx."""
    start, end = ends(losses)
    if end <= start + FORGOTTEN * abs(start):
        return None
    return Finding(
        f"Forgetting: ptx/loss rose from {start:.3g} to {end:.3g}.",
        "a higher --ptx_coef; a lower --actor_learning_rate; a higher --kl_coef.",
    )

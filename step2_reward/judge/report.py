"""What a judge's comparisons say of the judge: position bias, and agreement with people. Figures, then text.

A pair is judged twice, with either response shown first. Log-odds, in nats, are always those that response A
is better.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.numeric.intervals import format_share, share
from common.text.record_formats import Record


def debias(a_first: np.ndarray, b_first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of A without position bias, and the bias: (N,) and (N,), from those of the two orders.

    Where a judge adds b nats to the log-odds of what is shown first, the orders say s + b and s - b, so that
    half their sum is s and half their difference b, exactly. (Lee et al. 2023, RLAIF, section 2.1.1, average
    the probabilities instead, which cancels the sign of a bias, and pulls all preferences towards a tie.)
    """
    return (a_first + b_first) / 2, (a_first - b_first) / 2


def probability(log_odds: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return 0.5 * (1 + np.tanh(log_odds / 2))


def measure(records: Sequence[Record]) -> dict[str, Any]:
    """Figures of a judge on the records that it has judged; ties of people are counted and left aside.

    Position bias: `shown_first` is the mean probability of the response shown first, over both orders, 1/2
    without a bias, and `nats` the mean of `debias`. `consistent` is how often both orders name the same
    response (Zheng et al. 2023, section 4.2), `always_first` how often both name the one shown first.
    Agreement with people is a share of the pairs that they decided, half for one that the judge does not: of
    both orders together, and of a single one, averaged over the two.
    """
    judged = [record["judge"] for record in records if record["judge"]]
    orders = [np.array([said[name] for said in judged]) for name in ("log_odds_a_first", "log_odds_b_first")]
    a_first, b_first = orders
    log_odds, bias = debias(a_first, b_first)
    human = np.array([record["human"] for record in records if record["judge"]])
    decided = (human == "A") | (human == "B")
    right = [_right(said, human == "A")[decided] for said in (log_odds, *orders)]
    count = len(judged)
    return {
        "pairs": len(records),
        "judged": count,
        "letters": float(np.mean([said["letters"] for said in judged])) if judged else None,
        "position": {
            "shown_first": float((probability(a_first) + probability(-b_first)).mean() / 2)
            if judged
            else None,
            "nats": float(bias.mean()) if judged else None,
            "consistent": share(float((a_first * b_first > 0).sum()), count),
            "always_first": share(float(((a_first > 0) & (b_first < 0)).sum()), count),
            "always_second": share(float(((a_first < 0) & (b_first > 0)).sum()), count),
        },
        "agreement": {
            "labelled": sum(said is not None for said in human),
            "ties": int((human == "tie").sum()),
            "both_orders": share(float(right[0].sum()), int(decided.sum())),
            "one_order": share(float((right[1] + right[2]).sum() / 2), int(decided.sum())),
        },
    }


def describe(figures: dict[str, Any]) -> str:
    """The figures as text."""
    left_out = figures["pairs"] - figures["judged"]
    lines = [f"{figures['judged']} pairs judged; {left_out} left out, longer than --max_length"]
    if not figures["judged"]:
        return lines[0]
    position, agreement = figures["position"], figures["agreement"]
    lines += [
        f"probability of the letters A and B: {figures['letters']:.1%} of all that could be answered",
        f"position bias: {position['shown_first']:.1%} for what is shown first, {position['nats']:+.3f} nats",
        f"same response in both orders: {format_share(position['consistent'])}",
        f"the one shown first in both: {format_share(position['always_first'])}",
        f"the one shown second in both: {format_share(position['always_second'])}",
        f"agreement with people, both orders together: {format_share(agreement['both_orders'])}",
        f"agreement with people, one order alone: {format_share(agreement['one_order'])}",
    ]
    return "\n".join(lines)


def _right(log_odds: np.ndarray, is_a: np.ndarray) -> np.ndarray:
    """1 where the judge names what people prefer, 1/2 where it names neither."""
    return 0.5 + 0.5 * np.sign(log_odds) * np.where(is_a, 1, -1)

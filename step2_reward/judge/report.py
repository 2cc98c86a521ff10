"""Metrics of a judge: position bias, and agreement with people.

A pair is judged in both orders. Log-odds, in nats, are always those of response A being better.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.numeric.intervals import format_share, share
from common.text.record_formats import Record


def debias(a_first: np.ndarray, b_first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of A without position bias, and the bias: (N,) and (N,), from those of both orders.

    If a judge adds b nats to the log-odds of the response shown first, the orders give s + b and s - b: s is
    half their sum, b half their difference. (Lee et al. 2023, RLAIF, section 2.1.1, average probabilities
    instead, which pulls all preferences towards a tie.)
    """
    return (a_first + b_first) / 2, (a_first - b_first) / 2


def probability(log_odds: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return 0.5 * (1 + np.tanh(log_odds / 2))


def judge_metrics(records: Sequence[Record]) -> dict[str, Any]:
    """Compute position bias and agreement with people from judged records.

    Position bias: `shown_first` is the mean probability of the response shown first over both orders, 1/2
    without bias; `nats` is the mean bias of `debias`. `consistent`: share of pairs with the same preference
    in both orders (Zheng et al. 2023, section 4.2). `always_first`: share where both orders prefer the
    response shown first. Agreement excludes ties of people, and counts ties of the judge half: for both
    orders combined, and for a single order as the mean of both.
    """
    judged = [record["judge"] for record in records if record["judge"]]
    orders = [np.array([one[name] for one in judged]) for name in ("log_odds_a_first", "log_odds_b_first")]
    a_first, b_first = orders
    log_odds, bias = debias(a_first, b_first)
    human = np.array([record["human"] for record in records if record["judge"]])
    decided = (human == "A") | (human == "B")
    right = [_right(values, human == "A")[decided] for values in (log_odds, *orders)]
    count = len(judged)
    return {
        "pairs": len(records),
        "judged": count,
        "letters": float(np.mean([one["letters"] for one in judged])) if judged else None,
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
            "labelled": sum(label is not None for label in human),
            "ties": int((human == "tie").sum()),
            "both_orders": share(float(right[0].sum()), int(decided.sum())),
            "one_order": share(float((right[1] + right[2]).sum() / 2), int(decided.sum())),
        },
    }


def format_judge_metrics(metrics: dict[str, Any]) -> str:
    """Format the metrics as text."""
    dropped = metrics["pairs"] - metrics["judged"]
    lines = [f"{metrics['judged']} pairs judged; {dropped} dropped, longer than --max_length"]
    if not metrics["judged"]:
        return lines[0]
    position, agreement = metrics["position"], metrics["agreement"]
    lines += [
        f"probability of the letters A and B among all answers: {metrics['letters']:.1%}",
        f"position bias: {position['shown_first']:.1%} for the response shown first,"
        f" {position['nats']:+.3f} nats",
        f"same preference in both orders: {format_share(position['consistent'])}",
        f"first response preferred in both orders: {format_share(position['always_first'])}",
        f"second response preferred in both orders: {format_share(position['always_second'])}",
        f"agreement with people, both orders combined: {format_share(agreement['both_orders'])}",
        f"agreement with people, single order: {format_share(agreement['one_order'])}",
    ]
    return "\n".join(lines)


def _right(log_odds: np.ndarray, is_a: np.ndarray) -> np.ndarray:
    """1 where the judge agrees with people, 1/2 where it prefers neither."""
    return 0.5 + 0.5 * np.sign(log_odds) * np.where(is_a, 1, -1)

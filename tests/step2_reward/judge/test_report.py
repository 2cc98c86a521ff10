"""Metrics of a judge: a known bias is removed, and shares match hand counts."""

import numpy as np
import pytest

from common.numeric.intervals import wilson
from step2_reward.judge.report import debias, format_judge_metrics, judge_metrics, probability


def test_an_additive_bias_is_measured_and_removed():
    """For any scores and biases, the log-odds are the scores of the Bradley-Terry model, exactly."""
    rng = np.random.default_rng(0)
    scores, bias = rng.normal(0, 3, 1000), rng.normal(2, 3, 1000)
    log_odds, shown_first = debias(scores + bias, scores - bias)
    np.testing.assert_allclose(log_odds, scores, atol=1e-12)
    np.testing.assert_allclose(shown_first, bias, atol=1e-12)
    np.testing.assert_allclose(probability(log_odds), 1 / (1 + np.exp(-scores)), atol=1e-15)
    with np.errstate(all="raise"):
        assert probability(np.array([-1e4, 1e4])).tolist() == [0.0, 1.0]


def judged(human: str | None, a_first: float, b_first: float) -> dict:
    return {
        "human": human,
        "judge": {"log_odds_a_first": a_first, "log_odds_b_first": b_first, "letters": 0.5},
    }


RECORDS = [
    judged("A", 2.0, 1.0),  # A in both orders: right
    judged("B", 3.0, -1.0),  # first in both orders; combined A: wrong, and right in one order
    judged("A", -1.0, 1.0),  # second in both orders; combined a tie: half right
    judged("tie", 1.0, 1.0),
    judged(None, -2.0, -2.0),
    {"human": "A", "judge": None},  # overlong
]


def test_metrics_match_hand_counts():
    metrics = judge_metrics(RECORDS)
    assert (metrics["pairs"], metrics["judged"], metrics["letters"]) == (6, 5, 0.5)
    position, agreement = metrics["position"], metrics["agreement"]
    sigmoid = [
        1 / (1 + np.exp(-x)) for x in (2, -1, 3, 1, -1, -1, 1, -1, -2, 2)
    ]  # of the response shown first
    assert position["shown_first"] == pytest.approx(np.mean(sigmoid), rel=1e-12)
    assert position["nats"] == pytest.approx((0.5 + 2 - 1 + 0 + 0) / 5)
    shares = {name: position[name]["share"] for name in ("consistent", "always_first", "always_second")}
    assert shares == {"consistent": 3 / 5, "always_first": 1 / 5, "always_second": 1 / 5}
    assert (agreement["labelled"], agreement["ties"]) == (4, 1)
    assert agreement["both_orders"] == {"share": 0.5, "interval": wilson(0.5, 3), "of": 3}
    assert agreement["one_order"]["share"] == pytest.approx((2 + 1 + 1) / 6)
    assert "6 pairs" not in format_judge_metrics(
        metrics
    ) and "5 pairs judged; 1 dropped" in format_judge_metrics(metrics)


def test_undefined_metrics_are_none():
    unlabelled = judge_metrics([judged(None, 1.0, 2.0)])
    assert unlabelled["agreement"]["both_orders"] is None and "no records to measure" in format_judge_metrics(
        unlabelled
    )
    nothing = judge_metrics(RECORDS[-1:])
    assert (nothing["judged"], nothing["letters"], nothing["position"]["consistent"]) == (0, None, None)
    assert format_judge_metrics(nothing) == "0 pairs judged; 1 dropped, longer than --max_length"

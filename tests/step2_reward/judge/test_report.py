"""Figures of a judge: a bias that is put in is found and cancelled, and shares are those counted by hand."""

import numpy as np
import pytest

from common.numeric.intervals import wilson
from step2_reward.judge.report import debias, describe, measure, probability


def test_an_additive_bias_is_found_and_cancelled():
    """Scores and a bias of any size: what is left are the scores of Bradley and Terry, exactly."""
    rng = np.random.default_rng(0)
    scores, bias = rng.normal(0, 3, 1000), rng.normal(2, 3, 1000)
    found, shown_first = debias(scores + bias, scores - bias)
    np.testing.assert_allclose(found, scores, atol=1e-12)
    np.testing.assert_allclose(shown_first, bias, atol=1e-12)
    np.testing.assert_allclose(probability(found), 1 / (1 + np.exp(-scores)), atol=1e-15)
    with np.errstate(all="raise"):
        assert probability(np.array([-1e4, 1e4])).tolist() == [0.0, 1.0]


def judged(human: str | None, a_first: float, b_first: float) -> dict:
    return {
        "human": human,
        "judge": {"log_odds_a_first": a_first, "log_odds_b_first": b_first, "letters": 0.5},
    }


RECORDS = [
    judged("A", 2.0, 1.0),  # A in both orders: right
    judged("B", 3.0, -1.0),  # the first in both orders; together A: wrong, and in one order right
    judged("A", -1.0, 1.0),  # the second in both orders; together neither: half right
    judged("tie", 1.0, 1.0),
    judged(None, -2.0, -2.0),
    {"human": "A", "judge": None},  # did not fit
]


def test_figures_are_those_counted_by_hand():
    found = measure(RECORDS)
    assert (found["pairs"], found["judged"], found["letters"]) == (6, 5, 0.5)
    position, agreement = found["position"], found["agreement"]
    sigmoid = [1 / (1 + np.exp(-x)) for x in (2, -1, 3, 1, -1, -1, 1, -1, -2, 2)]  # of the one shown first
    assert position["shown_first"] == pytest.approx(np.mean(sigmoid), rel=1e-12)
    assert position["nats"] == pytest.approx((0.5 + 2 - 1 + 0 + 0) / 5)
    shares = {name: position[name]["share"] for name in ("consistent", "always_first", "always_second")}
    assert shares == {"consistent": 3 / 5, "always_first": 1 / 5, "always_second": 1 / 5}
    assert (agreement["labelled"], agreement["ties"]) == (4, 1)
    assert agreement["both_orders"] == {"share": 0.5, "interval": wilson(0.5, 3), "of": 3}
    assert agreement["one_order"]["share"] == pytest.approx((2 + 1 + 1) / 6)
    assert "6 pairs" not in describe(found) and "5 pairs judged; 1 left out" in describe(found)


def test_what_was_not_measured_is_none():
    unlabelled = measure([judged(None, 1.0, 2.0)])
    assert unlabelled["agreement"]["both_orders"] is None and "no records to measure" in describe(unlabelled)
    nothing = measure(RECORDS[-1:])
    assert (nothing["judged"], nothing["letters"], nothing["position"]["consistent"]) == (0, None, None)
    assert describe(nothing) == "0 pairs judged; 1 left out, longer than --max_length"

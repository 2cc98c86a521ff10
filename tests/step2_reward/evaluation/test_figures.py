"""Metrics of the reward-model report, against closed forms and plain counting."""

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch

from step2_reward.evaluation.figures import (
    LENGTHS,
    ScoredPairs,
    accuracy,
    by_quarter,
    length_bucket,
    prediction,
    ranks,
    reward_metrics,
)
from step2_reward.evaluation.report_text import table
from step2_reward.loss import pairwise_loss

DRAW = np.random.default_rng(0)


def pairs(chosen, rejected, **fields) -> ScoredPairs:
    """Preferences with these scores, and defaults for the other fields."""
    count = len(chosen)
    plain = {
        "chosen_lengths": np.full(count, 10),
        "rejected_lengths": np.full(count, 10),
        "margins": np.zeros(count),
        "is_tie": np.zeros(count, bool),
        "sources": np.full(count, "a.jsonl"),
        "agreement": np.full(count, np.nan),
    }
    fields = plain | {name: np.array(values) for name, values in fields.items()}
    return ScoredPairs(np.array(chosen, float), np.array(rejected, float), **fields)


def test_accuracy_excludes_ties_and_counts_equal_scores_half():
    judged = pairs([3, 1, 2, 0, 9], [1, 2, 2, -1, 0], is_tie=np.arange(5) == 4)
    metrics = reward_metrics(judged)
    assert (metrics["pairs"], metrics["ties"]) == (5, 1)
    assert (metrics["accuracy"]["pairs"], metrics["accuracy"]["accuracy"]) == (4, 2.5 / 4)
    assert metrics["scores"]["chosen"]["mean"] == 1.5 and metrics["scores"]["all"]["mean"] == 1.9


@pytest.mark.parametrize(("right", "wrong"), [(7, 3), (1, 0), (0, 5), (40, 0), (913, 87)])
def test_the_interval_is_that_of_the_score_test(right, wrong):
    """Wilson's limits are the two p with |share - p| = z sqrt(p (1 - p) / n)."""
    metrics = accuracy(np.array([1.0] * right + [-1.0] * wrong))
    assert 0 <= metrics["low"] <= metrics["accuracy"] <= metrics["high"] <= 1
    z = NormalDist().inv_cdf(0.975)
    for p in (metrics["low"], metrics["high"]):
        distance = abs(metrics["accuracy"] - p)
        assert distance == pytest.approx(z * (p * (1 - p) / (right + wrong)) ** 0.5, rel=1e-6, abs=1e-9)
    assert metrics["high"] - metrics["low"] > 0.01


def test_the_share_is_inside_its_interval_despite_rounding():
    for count in range(1, 300):
        for sign in (-1.0, 1.0):
            metrics = accuracy(np.full(count, sign))
            assert 0 <= metrics["low"] <= metrics["accuracy"] <= metrics["high"] <= 1


def test_groups_by_source_and_raters():
    judged = pairs(
        [1, 1, 0, 0], [0, 0, 1, 1], sources=["x", "y", "y", "y"], agreement=[1.0, 0.6, 1.0, float("nan")]
    )
    by = reward_metrics(judged)["accuracy_by"]
    assert {name: (one["pairs"], one["accuracy"]) for name, one in by["source"].items()} == {
        "x": (1, 1.0),
        "y": (3, 1 / 3),
    }
    assert {name: (one["pairs"], one["accuracy"]) for name, one in by["raters"].items()} == {
        "divided": (1, 1.0),
        "unanimous": (2, 0.5),
    }
    assert reward_metrics(judged)["agreement"] == {"pairs": 3, "mean": pytest.approx(2.6 / 3)}


@pytest.mark.parametrize(
    ("chosen", "rejected", "name"),
    [
        (10, 10, "about equal"),
        (109, 100, "about equal"),
        (110, 100, "chosen longer"),
        (199, 100, "chosen longer"),
        (200, 100, "chosen much longer"),
        (0, 1, "about equal"),
    ],
)
def test_length_buckets_are_symmetric(chosen, rejected, name):
    judged = pairs([0, 0], [0, 0], chosen_lengths=[chosen, rejected], rejected_lengths=[rejected, chosen])
    there, back = length_bucket(judged)
    assert LENGTHS[there] == name and LENGTHS[back] == name.replace("longer", "shorter")


def test_quarters_of_margins():
    even = by_quarter(np.arange(1.0, 101), np.ones(100))
    assert list(even) == ["1 to 25", "26 to 50", "51 to 75", "76 to 100"]
    assert [one["pairs"] for one in even.values()] == [25] * 4
    few = by_quarter(np.array([1.0, 3.0, 1.0, 1.0, 3.0]), np.array([1.0, -1, 1, 1, 1]))
    assert {name: (one["pairs"], one["accuracy"]) for name, one in few.items()} == {
        "1": (3, 1.0),
        "3": (2, 0.5),
    }
    some = reward_metrics(pairs([1, 1, 1], [0, 0, 0], margins=[0, 2, -1]))["accuracy_by"]["margin"]
    assert sum(one["pairs"] for one in some.values()) == 2, "a margin of 0 means no margin"


def test_log_loss_is_the_loss_of_raw_scores():
    raw = DRAW.normal(1, 3, (2, 500))
    metrics = reward_metrics(pairs(*(raw - 0.7) / 2.5), reward_std=2.5)["prediction"]["log_loss"]
    assert metrics == pytest.approx(pairwise_loss(*torch.tensor(raw)).double().mean().item(), rel=1e-5)
    assert prediction(np.array([1000.0, -1000.0]))["log_loss"] == 500.0


def test_calibration_error_matches_that_of_pairs_in_both_orders():
    difference = DRAW.normal(0.5, 2, 700)
    both = np.concatenate([difference, -difference])
    probability, first_wins = 1 / (1 + np.exp(-both)), np.arange(1400) < 700
    error = 0.0
    for left in np.arange(20) / 20:
        inside = (left <= probability) & (probability < left + 1 / 20)
        if inside.any():
            error += inside.mean() * abs(first_wins[inside].mean() - probability[inside].mean())
    assert prediction(difference)["calibration_error"] == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize(("right", "error"), [(3, 0.0), (4, 0.25), (2, 0.25)])
def test_calibration_in_closed_form(right, error):
    """Four pairs predicted with 75 % are calibrated if three of them are right."""
    metrics = prediction(np.log(3) * np.where(np.arange(4) < right, 1, -1))
    assert metrics["calibration_error"] == pytest.approx(error, abs=1e-12)
    assert metrics["confidence"] == pytest.approx(0.75)


def test_saturation_counts_right_and_wrong_pairs():
    edge = np.log(0.999 / 0.001)
    assert prediction(np.array([edge + 0.01, -edge - 0.01, edge - 0.01, 0.0]))["saturation"] == 0.5


def test_ranks_and_correlations():
    values = DRAW.integers(0, 20, 100)
    counted = [1 + (values < v).sum() + ((values == v).sum() - 1) / 2 for v in values]
    assert ranks(values).tolist() == counted
    lengths = np.arange(1, 9)
    curved = pairs(
        np.exp(lengths[::2]),
        np.exp(lengths[1::2]),
        chosen_lengths=lengths[::2],
        rejected_lengths=lengths[1::2],
    )
    metrics = reward_metrics(curved)["length"]
    x, y = lengths - lengths.mean(), np.exp(lengths) - np.exp(lengths).mean()
    assert metrics["pearson"] == pytest.approx((x * y).sum() / ((x**2).sum() * (y**2).sum()) ** 0.5)
    assert metrics["spearman"] == pytest.approx(1.0)
    assert metrics["longer_wins"]["accuracy"] == 0.0 and metrics["prefers_longer"]["accuracy"] == 1.0


def test_longer_wins_and_prefers_longer_differ():
    """Longer response: chosen, chosen, rejected, neither; the model prefers longer, shorter, longer."""
    judged = pairs([1, 0, 0, 1], [0, 1, 1, 0], chosen_lengths=[9, 9, 5, 5], rejected_lengths=[5, 5, 9, 5])
    metrics = reward_metrics(judged)["length"]
    assert metrics["longer_wins"]["accuracy"] == 2.5 / 4
    assert (metrics["prefers_longer"]["pairs"], metrics["prefers_longer"]["accuracy"]) == (3, 2 / 3)


def test_spread():
    metrics = reward_metrics(pairs(np.arange(101), np.arange(101) - 2.0))["scores"]
    assert [metrics["chosen"][f"p{p}"] for p in (1, 5, 25, 50, 75, 95, 99)] == [1, 5, 25, 50, 75, 95, 99]
    assert metrics["chosen"]["std"] == pytest.approx(((101**2 - 1) / 12) ** 0.5)
    assert (metrics["difference"]["mean"], metrics["difference"]["std"]) == (2.0, 0.0)


def test_undefined_metrics_are_refused_or_none():
    with pytest.raises(ValueError, match="2 of 4 scores are not finite"):
        reward_metrics(pairs([1, float("nan")], [float("inf"), 0]))
    with pytest.raises(ValueError, match="all pairs are ties"):
        reward_metrics(pairs([1, 2], [0, 0], is_tie=[True, True]))
    metrics = reward_metrics(pairs([1], [1]))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert (
        metrics["length"]["pearson"]
        is metrics["length"]["prefers_longer"]
        is metrics["agreement"]["mean"]
        is None
    )
    assert "none" in table(metrics)


def test_the_table_is_aligned():
    judged = pairs(
        *DRAW.normal(0, 2, (2, 40)),
        sources=["short", "a/rather/long/name/of/a/file/of/preferences.jsonl"] * 20,
        margins=np.arange(40),
        agreement=[1.0, 0.75] * 20,
    )
    groups, facts, scores = table(reward_metrics(judged)).split("\n\n")
    header, *rows = groups.splitlines()
    assert [row.split("  ")[0] for row in rows] == [
        "all pairs",
        *["source"] * 2,
        "length",
        *["margin"] * 4,
        *["raters"] * 2,
    ]
    assert {row.index("%") + 1 for row in rows} == {header.index("accuracy") + len("accuracy")}
    assert {row[: row.index("%")].split()[-2] for row in rows} >= {"40", "20"}
    assert {len(line) for line in facts.splitlines()} == {header.index("pairs") + len("pairs")}
    assert len({len(line) for line in scores.splitlines()}) == 1

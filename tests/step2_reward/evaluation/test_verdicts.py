"""Each verdict appears for its problem only."""

import numpy as np
import pytest

from step2_reward.evaluation.figures import ScoredPairs, reward_metrics
from step2_reward.evaluation.verdicts import detect_problems, format_verdicts

HEALTHY = {"pairs": 2000, "right": 0.75, "confidence": 0.75}


def make_metrics(
    pairs: int, right: float, confidence: float, per_token: float = 0.0, agreement: float = np.nan
) -> dict:
    """Metrics of a model with this accuracy, confidence and score per token of length."""
    draw = np.random.default_rng(0)
    lengths, prompts = draw.integers(5, 50, (2, pairs)), draw.normal(0, 1, pairs)
    sign = np.where(np.arange(pairs) < right * pairs, 1, -1)
    chosen = prompts + sign * np.log(confidence / (1 - confidence)) + per_token * lengths[0]
    no, plain = np.zeros(pairs, bool), np.zeros(pairs)
    voted, names = np.full(pairs, agreement), np.full(pairs, "a")
    return reward_metrics(
        ScoredPairs(chosen, prompts + per_token * lengths[1], *lengths, plain, no, names, voted)
    )


def history(*lines: tuple[float, float]) -> list[dict]:
    """Lines of metrics.jsonl with these training accuracies and evaluation losses."""
    records = []
    for step, (accuracy, loss) in enumerate(lines, start=1):
        records += [{"step": step, "train/accuracy": accuracy}, {"step": step, "eval/loss": loss}]
    return records


CALM = history((0.5, 0.7), (0.6, 0.65), (0.7, 0.6), (0.72, 0.62))


def test_a_healthy_model_gets_one_line():
    assert detect_problems(make_metrics(**HEALTHY)) == detect_problems(make_metrics(**HEALTHY), CALM) == []
    assert (
        format_verdicts([], make_metrics(**HEALTHY, agreement=0.9), CALM)
        == "No problems detected in 2000 pairs."
    )
    assert format_verdicts([], make_metrics(**HEALTHY)) == (
        "No problems detected in 2000 pairs; not checked: overfitting (no evaluations in metrics.jsonl beside"
        " the model), rater agreement (no votes)."
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"right": 0.64},
            "Low accuracy, from noisy labels or too little training: 64.0% (95% interval 61.9% to 66.1%).",
        ),
        ({"right": 0.6, "confidence": 0.6, "agreement": 0.7}, "raters agree with their majority in 70.0%"),
        ({"right": 0.91}, "Accuracy too high for preferences, from a trivial signal or a leak: 91.0%"),
        ({"pairs": 100}, "Accuracy is uncertain: 100 pairs, 95% interval 65.7% to 82.5%."),
        ({"confidence": 0.505}, "Collapsed scores: mean confidence is 50.50%"),
        (
            {"right": 0.7, "confidence": 0.93},
            "No better than a coin toss: the log-loss is 0.849 nats",
        ),
        ({"per_token": 0.02}, ""),
    ],
)
def test_one_problem_gives_one_verdict(change, text):
    detected = detect_problems(make_metrics(**HEALTHY | change), CALM)
    assert len(detected) == bool(text)
    if text:
        assert text in detected[0].found and detected[0].advice.endswith(".")
        report = format_verdicts(detected, make_metrics(**HEALTHY | change))
        assert report.startswith(
            f"- {detected[0].found}\n  Try: {detected[0].advice}\nNot checked: overfitting"
        )


def test_saturated_scores_are_also_no_better_than_a_coin_toss():
    detected = detect_problems(make_metrics(**HEALTHY | {"confidence": 0.9995}), CALM)
    assert [one.found.split(":")[0] for one in detected] == ["No better than a coin toss", "Saturated scores"]
    assert "Saturated scores: 100.0% of pairs" in detected[1].found


@pytest.mark.parametrize("confidence", [0.505, 0.9995])
def test_probabilities_of_an_ensemble_are_not_checked(confidence):
    """Only checks of the order of scores apply."""
    ensemble = make_metrics(2000, 0.6, confidence)
    judged = detect_problems(ensemble, CALM, is_ensemble=True)
    assert [one.found.split(",")[0] for one in judged] == ["Low accuracy"]
    assert len(detect_problems(ensemble, CALM)) > 1
    assert "Not checked: confidence and log-loss" in format_verdicts(judged, ensemble, CALM, is_ensemble=True)


@pytest.mark.parametrize("per_token", [0.1, -0.1])
def test_scores_that_follow_length(per_token):
    """The rank correlation is used when no pair differs in length."""
    by_length = make_metrics(**HEALTHY | {"confidence": 0.55, "per_token": per_token})
    text = format_verdicts(detect_problems(by_length), by_length)
    share = by_length["length"]["prefers_longer"]["accuracy"]
    assert f"the longer response scores higher in {share:.1%} of pairs, and is chosen in" in text
    by_length["length"]["prefers_longer"] = None
    assert f"rank correlation is {by_length['length']['spearman']:+.2f}" in format_verdicts(
        detect_problems(by_length), by_length
    )


def test_few_pairs_give_no_verdict_on_length():
    few = make_metrics(10, 0.8, 0.6, per_token=0.05)
    text = format_verdicts(detect_problems(few), few)
    assert "Accuracy is uncertain" in text and "the longer response" not in text


@pytest.mark.parametrize(
    ("lines", "is_overfitting"),
    [
        ([(0.6, 0.6), (0.7, 0.5), (0.9, 0.55)], True),
        ([(0.6, 0.6), (1.0, 0.5), (1.0, 0.55)], True),
        ([(0.6, 0.6), (0.7, 0.5), (0.9, 0.52)], False),  # too small a rise
        ([(0.6, 0.6), (0.7, 0.5), (0.9, 0.6), (0.9, 0.5)], False),  # fell again
        ([(0.6, 0.6), (0.9, 0.5), (0.5, 0.9)], False),  # diverged: training accuracy fell too
        ([(0.6, 0.6), (0.7, 0.5), (0.9, None)], False),
        ([(0.6, 0.6)], False),
    ],
)
def test_overfitting(lines, is_overfitting):
    detected = detect_problems(make_metrics(**HEALTHY), history(*lines))
    assert [verdict.found.split(":")[0] for verdict in detected] == ["Overfitting"] * is_overfitting


def test_overfitting_names_its_metrics():
    (detected,) = detect_problems(make_metrics(**HEALTHY), history((0.6, 0.6), (0.7, 0.5), (0.9, 0.55)))
    assert (
        detected.found
        == "Overfitting: eval/loss rose from 0.500 to 0.550 after step 2, train/accuracy from 70.0% to 90.0%."
    )

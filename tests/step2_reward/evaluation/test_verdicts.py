"""Each verdict appears where its trouble is, and nowhere else."""

import numpy as np
import pytest

from step2_reward.evaluation.figures import Judged, measure
from step2_reward.evaluation.verdicts import in_words, verdicts

HEALTHY = {"pairs": 2000, "right": 0.75, "confidence": 0.75}


def figures(
    pairs: int, right: float, confidence: float, per_token: float = 0.0, agreement: float = np.nan
) -> dict:
    """Pairs of which the model gets this share right, each with this confidence, or by length alone."""
    draw = np.random.default_rng(0)
    lengths, prompts = draw.integers(5, 50, (2, pairs)), draw.normal(0, 1, pairs)
    sign = np.where(np.arange(pairs) < right * pairs, 1, -1)
    chosen = prompts + sign * np.log(confidence / (1 - confidence)) + per_token * lengths[0]
    no, plain = np.zeros(pairs, bool), np.zeros(pairs)
    voted, names = np.full(pairs, agreement), np.full(pairs, "a")
    return measure(Judged(chosen, prompts + per_token * lengths[1], *lengths, plain, no, names, voted))


def history(*lines: tuple[float, float]) -> list[dict]:
    """Accuracy in training and evaluation loss, step by step, in lines as a run writes them."""
    found = []
    for step, (accuracy, loss) in enumerate(lines, start=1):
        found += [{"step": step, "train/accuracy": accuracy}, {"step": step, "eval/loss": loss}]
    return found


CALM = history((0.5, 0.7), (0.6, 0.65), (0.7, 0.6), (0.72, 0.62))


def test_a_healthy_model_gets_one_line():
    assert verdicts(figures(**HEALTHY)) == verdicts(figures(**HEALTHY), CALM) == []
    assert in_words([], figures(**HEALTHY, agreement=0.9), CALM) == "No problems detected in 2000 pairs."
    assert in_words([], figures(**HEALTHY)) == (
        "No problems detected in 2000 pairs; not checked: overfitting (no evaluations in metrics.jsonl beside"
        " the model), agreement of raters (no votes)."
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            {"right": 0.64},
            "Low accuracy, noisy labels or not converged: 64.0% (95% interval 61.9% to 66.1%).",
        ),
        ({"right": 0.6, "confidence": 0.6, "agreement": 0.7}, "raters agree with their majority in 70.0%"),
        ({"right": 0.91}, "Accuracy too good for preferences, a trivial signal or a leak: 91.0%"),
        ({"pairs": 100}, "Accuracy is known only roughly: 100 pairs, 95% interval 65.7% to 82.5%."),
        ({"confidence": 0.505}, "Collapsed scores: mean confidence is 50.50%"),
        (
            {"right": 0.7, "confidence": 0.93},
            "No better than a coin toss: the log-loss is 0.849 nats",
        ),
        ({"per_token": 0.02}, ""),
    ],
)
def test_one_trouble_one_verdict(change, found):
    said = verdicts(figures(**HEALTHY | change), CALM)
    assert len(said) == bool(found)
    if found:
        assert found in said[0].found and said[0].advice.endswith(".")
        text = in_words(said, figures(**HEALTHY | change))
        assert text.startswith(f"- {said[0].found}\n  Try: {said[0].advice}\nNot checked: overfitting")


def test_saturated_scores_of_wrong_pairs_are_no_better_than_a_coin_too():
    said = verdicts(figures(**HEALTHY | {"confidence": 0.9995}), CALM)
    assert [one.found.split(":")[0] for one in said] == ["No better than a coin toss", "Saturated scores"]
    assert "Saturated scores: 100.0% of pairs" in said[1].found


@pytest.mark.parametrize("confidence", [0.505, 0.9995])
def test_probabilities_of_an_ensemble_are_not_judged(confidence):
    """Its scores have another scale; what depends on their order only is judged."""
    ensemble = figures(2000, 0.6, confidence)
    judged = verdicts(ensemble, CALM, is_ensemble=True)
    assert [one.found.split(",")[0] for one in judged] == ["Low accuracy"]
    assert len(verdicts(ensemble, CALM)) > 1
    assert "Not checked: confidence and log-loss" in in_words(judged, ensemble, CALM, is_ensemble=True)


@pytest.mark.parametrize("per_token", [0.1, -0.1])
def test_scores_that_follow_length(per_token):
    """The rank correlation shows it too, when there is no pair of different lengths."""
    by_length = figures(**HEALTHY | {"confidence": 0.55, "per_token": per_token})
    text = in_words(verdicts(by_length), by_length)
    assert f"the longer wins {by_length['length']['prefers_longer']['accuracy']:.1%}, by the labels" in text
    by_length["length"]["prefers_longer"] = None
    assert f"rank correlation is {by_length['length']['spearman']:+.2f}" in in_words(
        verdicts(by_length), by_length
    )


def test_few_pairs_say_nothing_of_length():
    few = figures(10, 0.8, 0.6, per_token=0.05)
    text = in_words(verdicts(few), few)
    assert "known only roughly" in text and "the longer wins" not in text


@pytest.mark.parametrize(
    ("lines", "is_overfitting"),
    [
        ([(0.6, 0.6), (0.7, 0.5), (0.9, 0.55)], True),
        ([(0.6, 0.6), (1.0, 0.5), (1.0, 0.55)], True),
        ([(0.6, 0.6), (0.7, 0.5), (0.9, 0.52)], False),  # too little of a rise
        ([(0.6, 0.6), (0.7, 0.5), (0.9, 0.6), (0.9, 0.5)], False),  # it came down again
        ([(0.6, 0.6), (0.9, 0.5), (0.5, 0.9)], False),  # diverged: training became worse as well
        ([(0.6, 0.6), (0.7, 0.5), (0.9, None)], False),
        ([(0.6, 0.6)], False),
    ],
)
def test_overfitting(lines, is_overfitting):
    said = verdicts(figures(**HEALTHY), history(*lines))
    assert [verdict.found.split(":")[0] for verdict in said] == ["Overfitting"] * is_overfitting


def test_overfitting_names_its_figures():
    (said,) = verdicts(figures(**HEALTHY), history((0.6, 0.6), (0.7, 0.5), (0.9, 0.55)))
    assert (
        said.found
        == "Overfitting: eval/loss rose from 0.500 to 0.550 after step 2, train/accuracy from 70.0% to 90.0%."
    )

"""The report on runs: findings in healthy and unhealthy curves, and the contents of the page."""

import dataclasses
import fcntl
import json
import math
import random
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from common.runtime.options import UserError
from launch.report.curves import draw_panel, draw_trade, panels
from launch.report.findings import RULES, check_run
from launch.report.hacks import over_optimisation
from launch.report.main import write_report
from launch.report.read import columns
from launch.report.rule import Finding
from launch.report.scan import scan
from launch.report.stages import stages
from launch.report.trends import ends, error_of_change, peak, running_means
from step1_sft.options import SFTOptions
from step2_reward.annotate.options import SamplePairsOptions
from step2_reward.judge.options import JudgeOptions
from step2_reward.options import RewardOptions
from step3_ppo.best_of_n.options import SampleOptions
from step3_ppo.options import PPOOptions
from tests.conftest import REPOSITORY

STEPS, EVALUATIONS = 60, 15


def towards(start: float, end: float, noise: float, count: int = STEPS) -> list[float]:
    """A curve that levels off, with seeded noise."""
    draw = random.Random(f"{start} {end}")
    shape = (1 - math.exp(-5 * i / count) for i in range(count))
    return [start + (end - start) * part + draw.gauss(0, noise) for part in shape]


HEALTHY = {
    "reward/mean": towards(-0.5, 1.2, 0.05),
    "kl/mean": towards(0, 4, 0.05),
    "policy/entropy": towards(2, 1, 0.02),
    "policy/clip_fraction": towards(0.15, 0.02, 0.01),
    "value/explained_var": towards(-0.3, 0.8, 0.05),
    "response/length": towards(30, 35, 1),
    "response/eos_rate": towards(0.8, 0.95, 0.01),
    "response/distinct_2": towards(0.97, 0.93, 0.01),
    "response/repeated_3": towards(0.01, 0.03, 0.005),
    "eval/score": towards(-0.5, 1.2, 0.03, EVALUATIONS),
    "eval/gold": towards(0.2, 0.7, 0.03, EVALUATIONS),
    "eval/kl": towards(0, 5, 0.1, EVALUATIONS),
    "eval/distinct_2": towards(0.97, 0.93, 0.01, EVALUATIONS),
    "eval/nll_chosen": towards(2.0, 1.95, 0.002, EVALUATIONS),
}


def findings(
    lines: list[dict], samples: list[dict] = (), stage: str = "", **options: object
) -> list[Finding]:
    return check_run(lines, samples, stage, options).findings


def logged(curves: dict[str, list[float]]) -> list[dict]:
    """Lines as a run writes them: training metrics at every step, evaluations in separate lines."""
    lines = []
    for prefix in (True, False):
        chosen = {name: values for name, values in curves.items() if name.startswith("eval/") is prefix}
        every = STEPS // EVALUATIONS if prefix else 1
        for i in range(max(map(len, chosen.values()), default=0)):
            values_at_step = {name: values[i] for name, values in chosen.items() if i < len(values)}
            lines.append({"step": (i + 1) * every, **values_at_step})
    return sorted(lines, key=lambda line: line["step"])


OVER_OPTIMISED = {"eval/gold": [0.2 + 0.16 * i if i < 5 else 0.9 - 0.04 * i for i in range(EVALUATIONS)]}
UNHEALTHY = {
    "Over-optimisation: gold peaked at 0.74 around step 20 ": OVER_OPTIMISED,
    "Score and length rise together": {"response/length": towards(30, 60, 1)},
    "Repetition: response/repeated_3 went from": {"response/repeated_3": towards(0.01, 0.3, 0.005)},
    "Repetition": {"response/distinct_2": towards(0.97, 0.7, 0.01)},
    "Collapsed entropy": {"policy/entropy": towards(2, 0.1, 0.002)},
    "Collapsed entropy: policy/entropy went from 0.0": {"policy/entropy": [0.04] * STEPS},
    "Rising entropy": {"policy/entropy": towards(0.5, 6, 0.02)},
    "Collapsed diversity": {"eval/distinct_2": towards(0.97, 0.3, 0.01, EVALUATIONS)},
    "Responses no longer end": {"response/eos_rate": [0.9] * 20 + [0.002] * 40},
    "Truncated responses: response/eos_rate is 0.0%": {"response/eos_rate": [0.0] * STEPS},
    "Truncated responses: response/eos_rate is 59": {"response/eos_rate": towards(0.4, 0.6, 0.01)},
    "Responses shrink: response/length went": {"response/length": towards(60, 10, 1)},
    "Penalties dominate: reward/penalty is 1 ": {
        "reward/penalty": [1.0] * STEPS,
        "reward/std": [0.8] * STEPS,
    },
    "Clipped scores: 30%": {"reward/clipped": [0.3] * STEPS},
    "Equal scores": {"reward/std": [0.0] * STEPS},
    "Falling score: reward/mean went": {"reward/mean": towards(1.2, -0.5, 0.05)},
    "Falling score: eval/score was": {"eval/score": towards(1.2, -0.5, 0.03, EVALUATIONS),
                                      "eval/gold": towards(0.2, 0.2, 0.03, EVALUATIONS)},
    "KL without gain: eval/kl is 4.9": {"eval/score": towards(0.5, 0.5, 0.03, EVALUATIONS)},
    "Falling gold: eval/gold went": {"eval/gold": [0.9, 0.7, 0.4], "eval/score": [0.1, 0.2, 0.3],
                                     "eval/kl": [0.0, 1.0, 2.0]},
    "Sampling and training disagree": {"policy/ratio": [1.1] * STEPS},
    "Sampler and trainer disagree: rollout/gap_mean is 0.05 nats per token at the end, and rollout/ess 40%": {
        "rollout/gap_mean": [0.01] * 20 + [0.05] * 40, "rollout/ess": [0.4] * STEPS,
    },
    "Forgetting: ptx/loss rose": {"ptx/loss": towards(2, 3, 0.01)},
    "Large gradients: policy/grad_norm went from 2": {"policy/grad_norm": [2.0] * 30 + [70.0] * 30},
    "Large gradients: value/grad_norm": {"value/grad_norm": [300.0] * STEPS},
    "Values that are not finite: value/loss, in 1 of 75 logged steps, first at step 3.": {
        "value/loss": [0.1, 0.1, None, *[0.1] * 57]
    },
    "Skipped updates: 4 in 60 steps": {"train/skipped_updates": [0.0] * 20 + [4.0] * 40},
    "Nothing is learnt: kl/mean is 0.0": {
        "reward/mean": [random.Random(i).gauss(0, 0.1) for i in range(STEPS)],
        "kl/mean": towards(0, 0.02, 0.001),
    },
    "Cost above its limit: cost/mean is 0.59": {
        "cost/mean": towards(0.3, 0.6, 0.005), "cost/limit": [0.2] * STEPS,
    },
    "KL jump: kl/mean went from 1.00 to 4.50 nats between steps 30 and 33.": {
        "kl/mean": [1.0] * 30 + [2.2, 3.4, 4.5] + [4.4] * 27
    },
    "Large KL: kl/mean exceeds 20 nats from step 53 ": {"kl/mean": [0.39 * i for i in range(STEPS)]},
    "Chosen responses become less likely: eval/nll_chosen rose from 2 to 2.2": {
        "eval/nll_chosen": [2.0, 2.1, 2.2]
    },
    "The critic does not learn": {"value/explained_var": towards(-0.1, -0.2, 0.05)},
    "Updates too large: policy/clip_fraction is 0.4": {"policy/clip_fraction": [0.4] * 16 + [0.0] * 44},
    "Updates too large: policy/approx_kl has a median of 0.3": {"policy/approx_kl": [0.3] * STEPS},
}  # fmt: skip


def test_healthy_run_has_no_findings():
    assert findings(logged(HEALTHY)) == []
    assert findings([]) == findings([{"step": 1, "train/loss": 2.0}]) == []
    assert columns([{"a": math.nan, "b": 1}, {"a": 1}, {"a": 2, "b": 3}], "a", "b") == [[2], [3]]


@pytest.mark.parametrize("start", UNHEALTHY)
def test_one_problem_one_finding(start):
    (finding,) = findings(logged(HEALTHY | UNHEALTHY[start]))
    assert finding.problem.startswith(start) and finding.problem.endswith(".")
    assert finding.advice.endswith(".")
    known = {name for stage in stages() for name in stage.known}
    assert set(re.findall(r"--(\w+)", finding.advice)) <= known


@pytest.mark.parametrize(
    "changes",
    [
        {"response/length": [30.0] * 48 + [60.0] * 12},  # long after the score has risen
        {"policy/grad_norm": [9.0] * STEPS},
        {"train/skipped_updates": [0.0] * STEPS},
        {"reward/penalty": [0.3] * STEPS, "reward/std": [0.8] * STEPS},
        {"policy/ratio": [1.001] * STEPS},
        {"rollout/gap_mean": [0.012] * STEPS, "rollout/ess": [0.9] * STEPS},
        {"kl/mean": [*[0.35 * i for i in range(18)], *[4.2, 6.6, 5.0, 6.4] * 11]},  # swings at its level
        {"reward/mean": [random.Random(i).gauss(0, 0.1) for i in range(STEPS)]},  # flat, but KL is not small
    ],
)
def test_small_changes_are_no_findings(changes):
    assert findings(logged(HEALTHY | changes)) == []


@pytest.mark.parametrize("scores", [[0.0, 1.0], [1.0, 0.0]], ids=["rises", "falls"])
def test_repetition_names_the_score(scores):
    lines = [
        {"step": step, "response/repeated_3": share, "reward/mean": score}
        for step, (share, score) in enumerate(zip([0.0, 0.4], scores, strict=True))
    ]
    (finding,) = findings(lines)
    assert ("while the score rose from 0 to 1." in finding.problem) == (scores == [0.0, 1.0])
    assert ("does not reward it" in finding.advice) == (scores == [1.0, 0.0])


ANSWERS = [f"{word} {word}s can be found in many {word} places" for word in "abcdefgh"]
CHANGED = [f"{word} ones may be found in all {word} towns" for word in "abcdefgh"]
SAME = "This is the one answer to all that you may ask"


@pytest.mark.parametrize(
    ("after", "score", "parts"),
    [
        (CHANGED, 1.0, []),
        ([SAME] * 8, 1.0, ["from 0 to 1", "100% of the samples at step 9 begin with “This is", "to 12%"]),
        ([SAME] * 8, -1.0, []),
        ([SAME] * 5 + CHANGED[5:], 1.0, ["62%", "at most 12% began alike"]),
        ([f"As you ask: {answer}" for answer in ANSWERS], 1.0, ["100%", "“As you ask:”"]),
        ([f"{i} {SAME}" for i in range(8)], 1.0, ["12%"]),  # the same but for their beginning
        ([SAME] * 4 + CHANGED[4:], 1.0, []),
    ],
)  # fmt: skip
def test_answers_that_become_alike(after, score, parts):
    lines = [{"step": 0, "eval/score": 0.0}, {"step": 9, "eval/score": score}]
    samples = [{"step": 0, "response": one} for one in ANSWERS]
    samples += [{"step": 9, "response": one} for one in after]
    alike = [one for one in findings(lines, samples) if one.problem.startswith("Answers become alike")]
    assert len(alike) == bool(parts) and all(part in alike[0].problem for part in parts)
    assert len(findings(lines, samples)) == len(alike) + (score < 0)  # a falling score is another finding
    for few in ([one for one in samples if one["step"] == 9], [*samples[:3], *samples[8:11]]):
        assert not any("alike" in one.problem for one in findings(lines, few))


def test_unchecked_rules_are_listed():
    """By reason, with the option that changes it."""
    trained = [{"step": 1, "reward/mean": 0.0, "kl/mean": 0.0}]
    scored = [*trained, {"step": 1, "eval/score": 0.0}]
    golden = [{"step": step, "eval/score": 0.0, "eval/gold": 0.0} for step in range(5)]
    samples = [{"step": step, "response": ""} for step in (0, 5) for _ in range(4)]
    alike, gold = "answers that become alike", "over-optimisation"
    for lines, chosen, expected in (
        (trained, [], {gold: ["eval_data", "eval_fraction", "eval_steps"]}),
        (scored, samples, {gold: ["gold_reward_model", "gold_function"]}),
        (trained + golden[:4], samples, {gold: ["eval_steps"]}),
        (trained + golden, samples, {}),
        (trained + golden, [], {alike: ["num_samples"]}),
        (trained + golden, samples[2:], {alike: ["num_samples"]}),
        (trained + golden, samples[:4], {alike: ["eval_steps"]}),
    ):
        unchecked = check_run(lines, chosen, "ppo").unchecked
        options = {name: re.findall(r"--(\w+)", why) for why, names in unchecked.items() for name in names}
        assert {
            name: options[name] for name in (gold, alike) if name in options and name in expected
        } == expected
        assert expected or not {gold, alike} & options.keys()
    assert not check_run([{"step": 1, "train/loss": 0.0}]).unchecked, "the stage is not known"


def preferences(curves: dict[str, list[float]], start: int = 0) -> list[dict]:
    """Twenty lines of training, and evaluations as they are given."""
    lines = [{"step": 5 * (i + 1), "train/loss": 0.69 - 0.01 * i, "train/accuracy": 0.7} for i in range(20)]
    count = max(map(len, curves.values()))
    return lines + [
        {"step": start + i * 100 // max(count - 1, 1), **{name: values[i] for name, values in curves.items()}}
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("stage", "curves", "options", "expected"),
    [
        ("reward", {"eval/loss": [0.7, 0.5], "eval/accuracy": [0.5, 0.75]}, {}, []),
        ("reward", {"eval/loss": [0.72, 0.70], "eval/accuracy": [0.5, 0.75]}, {}, ["No better than a coin"]),
        ("reward", {"eval/loss": [0.72, 0.70], "eval/accuracy": [0.5, 0.75]}, {"use_margin": True}, []),
        ("reward", {"eval/accuracy": [0.5, 0.53]}, {}, ["Accuracy near chance: 53.0%"]),
        ("reward", {"eval/accuracy": [0.5, 0.2]}, {}, ["Accuracy below chance: 20.0%"]),
        ("reward", {"eval/chosen_std": [0.5, 0.001]}, {}, ["Collapsed scores"]),
        ("direct", {"eval/loss": [0.6931, 0.6925]}, {}, ["Nothing is learnt: eval/loss was 0.6931"]),
        ("direct", {"eval/loss": [0.6931, 0.75]}, {"loss": "dpo"},
         ["Overfitting: eval/loss rose from 0.693 at step 0", "No better than a coin"]),
        ("direct", {"eval/loss": [2.5, 2.0]}, {"loss": "ipo"}, []),
        ("direct", {"eval/loss": [1.0, 0.8]}, {"loss": "hinge"}, []),
        ("direct", {"eval/nll_chosen": [2.0, 2.04]}, {}, ["Chosen responses become less likely"]),
        ("direct", {"eval/nll_chosen": [2.0, 2.01]}, {}, []),
        ("direct", {"eval/margin": [0.0, -0.2]}, {}, ["Negative margin: eval/margin is -0.2"]),
        ("direct", {"logratio/mean": [0.0, -80.0]}, {}, ["Far from the reference"]),
        ("sft", {"eval/loss": [3.0, 2.0]}, {}, []),
        ("sft", {"eval/loss": [3.0, 3.05]}, {}, ["Held-out loss rises: eval/loss went from 3 at step 0"]),
    ],
)  # fmt: skip
def test_levels_and_trends_of_steps_1_and_2(stage, curves, options, expected):
    result = findings(preferences(curves), stage=stage, **options)
    assert len(result) == len(expected), result
    assert all(one.problem.startswith(part) for one, part in zip(result, expected, strict=True)), result


def test_training_loss_of_a_coin_toss_counts_without_held_out_data():
    """Unless the loss contains other terms."""
    lines = [{"step": i, "train/loss": loss} for i, loss in enumerate([0.76, 0.8, 0.72] * 4, start=1)]
    for stage, options in (
        ("reward", {"centre_coef": 0.0, "use_margin": False}),
        ("direct", {"loss": "dpo"}),
    ):
        (finding,) = findings(lines, stage=stage, **options)
        assert finding.problem.startswith("No better than a coin toss: the loss on training pairs is 0.7"), (
            finding
        )
    for options in ({"centre_coef": 0.1}, {"lm_loss_coef": 0.1}, {"use_margin": True}, {"loss": "ipo"}):
        assert not findings(lines, stage="reward", **options)
    held_out = [{"step": 0, "eval/loss": 0.7}, {"step": 12, "eval/loss": 0.6}]
    assert not findings([*lines, *held_out], stage="reward")


def test_rising_held_out_loss_is_the_only_finding():
    """A constant training loss would give the opposite advice."""
    lines = [{"step": i, "train/loss": 0.5 + 0.1 * (i % 3)} for i in range(1, 13)]
    held_out = [{"step": 0, "eval/loss": 0.6}, {"step": 12, "eval/loss": 0.65}]
    (finding,) = findings([*lines, *held_out], stage="sft")
    assert finding.problem.startswith("Held-out loss rises")


def test_training_loss_does_not_fall():
    for losses, part in (
        ([2.0, 2.1, 2.4, 2.9, 3.5, 4.0, 4.6], "Diverged: train/loss rose from 2 to 4.6"),
        ([2.0, 2.2, 1.9, 2.1, 2.3, 2.0, 2.1], ""),  # too few to tell from noise
        ([2.0, 2.2, 1.9, 2.1, 2.3] * 2, "Nothing is learnt: train/loss went from 2.1 to 2.2"),
        ([9.0, 8.9, 8.8, 8.7, 8.5, 8.4, 8.2], "The model does not fit the data: the loss is 8.2 nats"),
        ([2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4], ""),
    ):
        lines = [{"step": i, "train/loss": loss, "train/lr": 1e-3} for i, loss in enumerate(losses)]
        result = findings(lines, stage="sft")
        assert [one.problem.startswith(part) for one in result] == [True] * bool(part), result
    noisy = [{"step": i + 1, "train/loss": loss} for i, loss in enumerate([1.25, 1.28, 1.22, 1.31, 1.26] * 2)]
    for start, is_learning in ((1.3, True), (1.2, False)):
        held_out = [{"step": 1, "eval/loss": start}, {"step": 10, "eval/loss": 1.2}]
        assert (not findings([*noisy, *held_out], stage="sft")) == is_learning
    (stuck,) = findings([{"step": i, "train/loss": 3.0 - i, "train/lr": 0.0} for i in range(5)], stage="sft")
    assert stuck.problem == "The learning rate is 0 in all logged steps."


def test_memorised_training_pairs():
    lines = preferences({"eval/accuracy": [0.5, 0.7]})
    for line in lines:
        line |= {"train/accuracy": 0.99} if "train/accuracy" in line else {}
    assert [one.problem for one in findings(lines, stage="reward")] == [
        "Overfitting: accuracy is 99.0% in training and 70.0% on held-out pairs."
    ]


def test_short_run_is_checked_for_levels_but_not_for_trends():
    lines = [{"step": step, "response/eos_rate": 0.0, "value/explained_var": -8.0} for step in (1, 2, 3)]
    judgement = check_run(lines, stage="ppo")
    assert judgement.is_short and (judgement.steps, judgement.logged, judgement.evaluations) == (3, 3, 0)
    assert [one.problem.split(":")[0] for one in judgement.findings] == [
        "Truncated responses", "The critic does not learn",
    ]  # fmt: skip
    falls = [{"step": i, "eval/score": s, "eval/score_std": 1.0} for i, s in enumerate([0.5, 0.4, 0.1])]
    assert [one.problem[:13] for one in findings(falls, stage="ppo")] == ["Falling score"]
    assert not findings([*falls[:2]], stage="ppo"), "by less than a quarter of the spread"
    assert not check_run([{"step": 10 * i, "train/loss": 3.0 - i} for i in range(5)], stage="sft").is_short


@pytest.mark.parametrize(
    ("ended", "penalty", "expected"),
    [
        ([0.1, 0.1], 1.0, ["Truncated responses"]),  # one finding, although the length is at the limit too
        ([0.1, 0.1], 0.0, []),
        ([0.9, 0.0], 0.0, ["Responses no longer end"]),
        ([0.9, 0.9], 1.0, ["Length at the limit"]),
        ([0.9, 0.9], 0.0, []),
    ],
)
def test_intended_truncation_is_no_finding(ended, penalty, expected):
    lines = [{"step": i, "response/eos_rate": rate, "response/length": 48.0} for i, rate in enumerate(ended)]
    result = findings(lines, stage="ppo", max_response_length=48, missing_eos_penalty=penalty)
    assert [one.problem.split(":")[0] for one in result] == expected
    assert not any("--missing_eos_penalty 0" in one.advice for one in result if not penalty)


@pytest.mark.parametrize("stage", ["reward", "direct"])
def test_levels_are_not_checked_at_step_0(stage):
    """An untrained model is a coin toss. The list of unchecked rules says that no later evaluation exists."""
    untrained = {
        "eval/loss": math.log(2), "eval/accuracy": 0.5, "eval/margin": 0.0, "eval/chosen_std": 0.0,
        "eval/nll_chosen": 2.0,
    }  # fmt: skip
    lines = [{"step": 0, **untrained}, *[line for line in preferences({"x": []}) if line["step"]]]
    judgement = check_run(lines, stage=stage)
    assert not judgement.findings
    (names,) = [names for why, names in judgement.unchecked.items() if "the only evaluation is at" in why]
    assert "held-out accuracy" in names and not any("1 evaluations" in why for why in judgement.unchecked)
    later = {one.problem.split(":")[0] for one in findings([*lines, {"step": 100, **untrained}], stage=stage)}
    assert {"Accuracy near chance", "No better than a coin toss"} < later
    assert not any("margin" in problem for problem in later), "neither response has the higher reward"


@pytest.mark.parametrize(
    ("scores", "spreads", "is_nothing"),
    [
        ([0.0, 0.5, 1.8, 1.9, 1.9], [1.0] * 5, False),
        ([0.0, 0.5, 1.8, 1.9, 1.9], [9.0] * 5, True),
        ([0.0, 0.5, 1.8, 1.9, 1.9], [], False),
        ([1.0, 1.02, 0.99, 1.01, 1.02], [], True),
    ],
)
def test_large_rise_of_the_score_is_a_gain(scores, spreads, is_nothing):
    lines = [{"step": i, "eval/kl": 3.0 * i, "eval/score": score} for i, score in enumerate(scores)]
    for line, spread in zip(lines, spreads, strict=False):
        line["eval/score_std"] = spread
    problems = [one.problem.split(":")[0] for one in findings(lines, stage="ppo")]
    assert problems == ["KL without gain"] * is_nothing


def test_two_values_are_too_few_for_a_length_hack():
    """Any two values correlate perfectly."""
    lines = [{"step": i, "reward/mean": 0.1 * i, "response/length": 30.0 + 5 * i} for i in range(5)]
    assert not findings([lines[0], lines[-1]], stage="ppo")
    assert [one.problem[:16] for one in findings(lines, stage="ppo")] == ["Score and length"]


def test_metrics_of_every_rule_have_a_panel():
    names = {name for rule in RULES for group in rule.groups for name in group} - {"step"}
    assert all(group != "Others" for group, _, _ in panels(sorted(names)))


@pytest.mark.parametrize(
    ("trained", "held_out", "is_overfitting"),
    [
        ([3, 2, 1.5, 1.2, 1, 0.8], [2.5, 2, 1.9, 2, 2.2, 2.4], True),
        ([3, 2, 1.5, 1.2, 1, 0.8], [2.5, 2, 1.9, 1.88, 1.87, 1.9], False),  # within 5 %
        ([3, 2, 1.5, 2.5, 2.8, 3], [2.5, 2, 1.9, 2, 2.2, 2.4], False),  # both rise: it diverges
        ([3, 2, 1.5, 1.2, 1, 0.8], [2, 2.5], True),
        ([3], [2.5], False),
    ],
)
def test_overfitting(trained, held_out, is_overfitting):
    lines = [{"step": step, "train/loss": loss} for step, loss in enumerate(trained, start=1)]
    lines += [{"step": step, "eval/loss": loss} for step, loss in enumerate(held_out, start=1)]
    problems = [finding.problem.split(":")[0] for finding in findings(lines)]
    assert ("Overfitting" in problems) == is_overfitting, problems


@pytest.mark.parametrize(
    ("farthest", "lowest", "highest"),
    [(1.0, 0.0, 0.05), (2.0, 0.95, 1.0), (0.0, 0.0, 0.1)],
    ids=["ends at its peak", "passes its peak", "flat"],
)
def test_over_optimisation_is_distinguished_from_noise(farthest, lowest, highest):
    """Gold as a function of the root of KL d, d (a - b log d) (Gao et al. 2023), with a peak at d = 1."""
    alarms = 0
    for seed in range(300):
        draw = random.Random(seed)
        distances = [farthest * (i + 1) / 20 for i in range(20)]
        golds = [(d * (1 - math.log(d)) if d else 0.5) + draw.gauss(0, 0.04) for d in distances]
        alarms += over_optimisation(range(20), range(20), golds) is not None
    assert lowest <= alarms / 300 <= highest


@pytest.mark.parametrize("count", [1, 4, 5, 7, 60])
def test_running_means_and_peak(count):
    values = np.random.default_rng(count).normal(size=count)
    width = max(1, count // 5)
    expected = np.convolve(values, np.ones(width) / width, mode="valid")
    np.testing.assert_allclose(running_means(values.tolist()), expected, atol=1e-12)
    np.testing.assert_allclose(ends(values.tolist()), [values[:width].mean(), values[-width:].mean()])
    index, top = peak(values.tolist()), int(expected.argmax())
    assert top <= index < top + width


def test_error_of_change_equals_the_spread_over_many_curves():
    """A trend does not change it, and a jump changes it little."""
    draw = np.random.default_rng(0)
    curves = draw.normal(0, 0.3, (2000, 100)) + np.linspace(0, 50, 100)
    changes = curves[:, -20:].mean(1) - curves[:, :20].mean(1)
    curves[:, 50:] += 7
    errors = [error_of_change(curve.tolist()) for curve in curves]
    assert np.mean(errors) == pytest.approx(changes.std(), rel=0.1)
    assert error_of_change([1, 2, 3, 4]) == math.inf


def test_every_metric_has_one_panel():
    names = [
        *HEALTHY,
        "train/loss",
        "eval/loss",
        "reward/mean_2",
        "kl/quarter_1",
        "reward/p10",
        "new/one",
    ]
    shown = list(panels(names))
    assert sorted(name for _, _, names in shown for name in names) == sorted(names)
    assert ("Learning", "Loss", ["train/loss", "eval/loss"]) in shown
    assert shown[-1] == ("Others", "new/one", ["new/one"])


def test_panel_shows_the_metrics():
    lines = logged(HEALTHY)
    lines[0]["reward/mean"] = None  # not finite
    names = ["reward/mean", "reward/p10", "reward/p90"]
    for line in lines:
        line |= {"reward/p10": -9.0, "reward/p90": 9.0} if "reward/mean" in line else {}
    figure, alt = draw_panel("Score", names, lines)
    (curve,) = figure.axes[0].lines
    assert curve.get_xydata().tolist() == [
        list(pair) for pair in zip(*columns(lines, "step", names[0]), strict=True)
    ]
    assert figure.axes[0].collections[0].get_datalim(figure.axes[0].transData).intervaly.tolist() == [-9, 9]
    assert alt.startswith("Score: reward/mean from ") and "at step 2 to" in alt


def test_gold_is_plotted_over_the_root_of_kl():
    lines = logged(HEALTHY | OVER_OPTIMISED)
    figure, alt = draw_trade(lines)
    kls, scores, golds = columns(lines, "eval/kl", "eval/score", "eval/gold")
    for axes, values in zip(figure.axes, (scores, golds), strict=True):
        curve, peak_line = axes.lines
        np.testing.assert_allclose(curve.get_xdata() ** 2, np.maximum(kls, 0))
        assert curve.get_ydata().tolist() == values
        assert peak_line.get_xdata()[0] ** 2 == pytest.approx(kls[4]), (
            "the window of the largest running mean is centred on it"
        )
    assert "Gold peaks around step 20: 0.84" in alt


class Page(HTMLParser):
    """Tags and text of a page. Fails if tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text, self.folded = "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data * ("style" not in self.open)
        self.folded += data * ("details" in self.open)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_run(folder: Path, options, curves: dict[str, list[float]]) -> None:
    folder.mkdir(parents=True)
    (folder / "options.json").write_text(json.dumps(dataclasses.asdict(options)))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in logged(curves)))


def sample(step: int, response: str, **others) -> dict:
    record = {"step": step, "prompt": "<b>Why & how?</b>", "response": response, "score": 0.5 * step}
    return record | {"length": 7, "ended": step == 0} | others


def finish(folder: Path) -> None:
    (folder / "final").mkdir()
    (folder / "final/config.json").write_text("{}")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of three steps: a healthy run, a short one without evaluations, an over-optimised one."""
    folder = tmp_path_factory.mktemp("out") / "<out>"
    write_run(
        folder / "step1_sft",
        SFTOptions(seed=7),
        {"train/loss": towards(2, 1, 0.01), "eval/loss": towards(2, 1.2, 0.001, EVALUATIONS)},
    )
    write_run(
        folder / "step2_reward",
        RewardOptions(golden_data=["<g>.jsonl"]),
        {"train/loss": [0.7, 0.6, 0.5], "train/accuracy": [0.5, 0.75, 0.625]},
    )
    write_run(folder / "step3_ppo", PPOOptions(kl_coef=0.123), HEALTHY | OVER_OPTIMISED)
    for step in ("step1_sft", "step2_reward", "step3_ppo"):
        finish(folder / step)
    part = {"pairs": 40, "accuracy": 0.7, "low": 0.5, "high": 0.8}
    verdicts = [{"found": "Low <accuracy>.", "advice": "better labels."}]
    golden = {"accuracy": part, "accuracy_by": {"source": {"a": part}}, "verdicts": verdicts}
    (folder / "step2_reward/golden").mkdir()
    (folder / "step2_reward/golden/report.json").write_text(json.dumps(golden))
    samples = [
        sample(0, "<script>alert(1)</script>"),
        sample(30, "middle\u2028"),
        sample(60, "at last", gold=0.25),
    ]
    lines = [json.dumps(one, ensure_ascii=False) for one in samples]
    (folder / "step3_ppo/samples.jsonl").write_text("\n".join([*lines, '{"st']))
    write_report(folder)
    return folder


def test_page_is_well_formed_and_self_contained(pipeline):
    page = Page(pipeline / "report.html")
    assert not {"script", "link"} & {tag for tag, _ in page.tags}
    assert all(
        image["src"].startswith("data:image/png;base64,iVBOR") and image["alt"] for image in page.all("img")
    )
    assert not any("://" in str(value) for _, attributes in page.tags for value in attributes.values())
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    links = [link["href"] for link in page.all("a")]
    assert len(ids) == len(set(ids)) and {f"#{one}" for one in ids} == set(links)
    pictures = list((pipeline / "report").rglob("*.png"))
    assert len(page.all("img")) == len(pictures) == 1 + 2 + len(list(panels(list(HEALTHY)))) + 1
    for title in ("Step 1: supervised", "Step 2: reward model", "Step 3: PPO"):
        assert title in page.text


def test_contents_of_the_page(pipeline):
    page = Page(pipeline / "report.html")
    for text in (
        "No problems detected in 60 steps (60 logged, 15 evaluations).",
        "Too short to judge trends: 3 steps (3 logged, 0 evaluations).",
        "overfitting, held-out loss against a coin toss, held-out accuracy, gap of accuracies (no",
        "Over-optimisation: gold peaked at 0.74 around step 20 and fell to 0.38",
        "answers that become alike (an evaluation has fewer than 4 samples",
        "samples.jsonl: skipped 1 line without a JSON object (first: line 4)",
        "Low <accuracy>.",
        "50.0% to 80.0%",
        "0.75 (step 2)",
        "<b>Why & how?</b>",
        "<script>alert(1)</script>",
        "step 60 · score 30 · gold 0.25 · 7 tokens · truncated",
        "at last",
    ):
        assert text in page.text, text
    assert "middle" not in page.text
    assert "missing:" not in page.text
    assert "--kl_coef0.1230.05" in page.text
    assert "--kl_coef0.123" not in page.folded and "--temperature" in page.folded
    green = [tag for tag in page.all("div") if tag.get("class") == "finding well"]
    assert len(green) == 1, "only step 1 is long enough and healthy"


def test_missing_files_are_named(tmp_path):
    write_run(tmp_path / "run", PPOOptions(), {})
    (tmp_path / "run/metrics.jsonl").unlink()
    text = Page(write_report(tmp_path / "run")).text
    assert "metrics.jsonl is missing" in text and "samples.jsonl is missing" in text
    assert "No step has been logged." in text and "No problems detected" not in text
    (tmp_path / "run/options.json").unlink()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n')
    text = Page(write_report(tmp_path / "run")).text
    assert "options.json is missing" in text and "samples.jsonl" not in text and "2.5" in text


SHORT = {"train/loss": [2.0, 1.5, 1.2]}


def verdicts(folder: Path) -> list[tuple[str, str]]:
    """The kind and the text of each card on the page."""
    content = write_report(folder).read_text(encoding="utf-8")
    return re.findall(r'<div class="finding ?(\w*)"><p>(.*?)</p>', content)


def test_unfinished_run_is_never_green(tmp_path):
    """Without final/, before the last step, and while it is in progress."""
    folder = tmp_path / "run"
    curves = {"train/loss": towards(2, 1, 0.01), "eval/loss": towards(2, 1.2, 0.001, EVALUATIONS)}
    write_run(folder, SFTOptions(max_steps=100), curves)
    (kind, text), (other, verdict), *_ = verdicts(folder)
    assert (kind, other) == ("", "absent") and verdict.startswith("No problems detected in 60 steps")
    assert text == "This run stopped at step 60 of 100; final/ is missing; there is no checkpoint."
    (folder / "checkpoints/step_000050").mkdir(parents=True)
    (folder / "checkpoints/step_000050/state.json").write_text("{}")
    assert "the newest checkpoint is step 50. Run the same command to resume." in verdicts(folder)[0][1]
    finish(folder)
    assert "final/ is from an earlier end" in verdicts(folder)[0][1]
    with (folder / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert verdicts(folder)[0] == ("", "The run is in progress, at step 60 of 100.")
    write_run(tmp_path / "done", SFTOptions(max_steps=60), curves)
    finish(tmp_path / "done")
    assert [kind for kind, _ in verdicts(tmp_path / "done")] == ["well", "absent"]
    (tmp_path / "done/options.json").unlink()
    (tmp_path / "done/train.log").write_text("step 60/90 | train/loss 1\nstep 60/80 | train/loss 1\n")
    assert "at step 60 of 80" in verdicts(tmp_path / "done")[1][1]


def test_adjusted_options_have_their_own_table(tmp_path):
    """According to the command lines in train.log; without any, all options are in one table."""
    folder = tmp_path / "run"
    write_run(folder, PPOOptions(max_prompt_length=191, kl_coef=0.2, whiten_advantages=False), SHORT)
    assert "Adjusted by the run" not in Page(write_report(folder)).text
    log = [
        "=== 2026",
        "command: bash launch/step3_ppo.sh --kl-coef=0.2",
        "step 1/3",
        "\x00 command: --seed 1",
    ]
    log += ["command: bash launch/step3_ppo.sh --no_whiten_advantages '--output_dir=a b'"]
    (folder / "train.log").write_text("\n".join(log))
    text = Page(write_report(folder)).text
    given, adjusted = text.split("Adjusted by the run, to the model or to other options")
    assert "--kl_coef0.2" in given and "--whiten_advantagesfalse" in given
    assert "--max_prompt_length191256" in adjusted and "--max_prompt_length191" not in given
    (folder / "train.log").write_text("command: 'never closed\n")
    assert "Adjusted by the run" not in Page(write_report(folder)).text


def test_early_stopping_finishes_a_run(tmp_path):
    write_run(tmp_path / "run", PPOOptions(early_stopping=3, max_steps=500), HEALTHY)
    finish(tmp_path / "run")
    texts = [text for _, text in verdicts(tmp_path / "run")]
    assert "Ended by --early_stopping 3 at step 60 of 500." in texts


BEST_OF_N = {
    "samples": 8, "demonstrations": 1, "preferences": 0, "score_of_demonstrations": 0.5, "prompts": 4,
    "score": {"mean": 0.1}, "selection": {"pairs": "worst"}, "prompts_with_demonstrations": 1,
    "max_response_length": 48, "unused": {"cut": 7, "empty": 0, "repeated": 0},
}  # fmt: skip


def test_any_mix_of_output_folders(tmp_path):
    """Runs at any depth, reports of other commands, other folders; round_2 before round_10."""
    for name in ("round_10", "round_2"):
        write_run(tmp_path / f"raft/{name}/step1_sft", SFTOptions(), SHORT)
        samples = tmp_path / f"raft/{name}/samples"
        samples.mkdir()
        (samples / "options.json").write_text(json.dumps(dataclasses.asdict(SampleOptions())))
        (samples / "samples.jsonl").write_text('{"group": 0, "prompt": "p", "completion": "c", "score": 1}\n')
        (samples / "report.json").write_text(json.dumps(BEST_OF_N))
    pairs = tmp_path / "best"  # also the name of a subfolder of runs
    pairs.mkdir()
    (pairs / "options.json").write_text(json.dumps(dataclasses.asdict(SamplePairsOptions())))
    (pairs / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "scored.jsonl").write_text('{"prompt": "p", "score": 1}\n')
    judge_folder = tmp_path / "judge"
    judge_folder.mkdir()
    (judge_folder / "options.json").write_text(json.dumps(dataclasses.asdict(JudgeOptions())))
    report = {"pairs": 3, "judged": 0, "position": {}, "agreement": {}}
    (judge_folder / "report.json").write_text(json.dumps(report))
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare/report.json").write_text('{"policies": 3, "best_of": [], "prompts": 1}')
    (tmp_path / "raft/final").symlink_to("round_2/step1_sft")
    (tmp_path / "raft/round_2/step1_sft/checkpoints/step_1/metrics.jsonl").mkdir(parents=True)
    page = Page(write_report(tmp_path))
    for part in (
        "kept 1 of 8 responses (mean score 0.500; all: 0.100), 0 pairs",
        "7 cut at 48 tokens: pass --keep_truncated, or raise --max_response_length in another --output_dir",
        "0 pairs judged; 3 dropped",
        "compare/report.json: cannot be shown: ",
        f"Not shown: {tmp_path.name} (data), best (sampled pairs).",
    ):
        assert part in page.text, part
    order = [page.text.index(f"(raft/{one})") for one in ("round_2/step1_sft", "round_10/step1_sft")]
    assert order == sorted(order)
    assert page.text.count("Step 1: supervised fine-tuning (raft") == 2 * 2, (
        "in the contents, and its chapter"
    )


def test_readable_parts_of_damaged_files_are_shown(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, PPOOptions(), HEALTHY)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = [
        b"\x00\xff\xfe garbage\n", b'{"step": 7, "reward/mean"\n', b"[" * 100_000 + b"\n", b"[1, 2]\n",
        b"null\n",
        b'{"reward/mean": 3}\n', b'{"step": "4"}\n', b'{"step": true}\n', b'{"step": -1}\n', b"\n",
        b'{"step": 9, "reward/mean": NaN, "kl/mean": "high", "value/loss": [1], "policy/loss": 1' + b"0" * 400
        + b', "eval/score": -Infinity, "x/\\ud800$_{": 1, "y/\\u65e5": 2}\n',
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_bytes(b"".join([*lines[:30], *bad, *lines[30:], b'{"step": 61, "rew']))
    (folder / "samples.jsonl").write_bytes(
        b'{"step": 0, "prompt": "p", "response": "\\ud800", "length": 1, "ended": true, "score": "x"}\n'
        b'{"step": 0, "prompt": 1}\n{"group": 3}\n\x00\n'
    )
    (folder / "golden").mkdir()
    (folder / "golden/report.json").write_text('{"accuracy": {"pairs": "many"}}')
    (folder / "options.json").write_text(
        json.dumps(dataclasses.asdict(PPOOptions()) | {"max_response_length": "long", "max_steps": None})
    )
    text = Page(write_report(folder)).text
    for part in (
        "metrics.jsonl: skipped 6 lines without a JSON object (first: line 31).",
        "metrics.jsonl: skipped 4 lines without a step (first: line 36).",
        "metrics.jsonl: skipped 3 values that are not numbers (kl/mean in line 41).",
        "samples.jsonl: skipped 1 line without a JSON object (first: line 4).",
        "samples.jsonl: skipped 2 lines without the fields of a sample (first: line 2).",
        "golden/report.json: not a report of step 2",
        "Values that are not finite: reward/mean, eval/score, in 1 of",
        "Logged from step 1 to 60.",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\x00" * 50, b'{"step": 1}\n', b'{"step": 1, "a": 1e308}\n']
)
def test_nearly_empty_files(tmp_path, content):
    """Empty, blank, zeroed, and a single value: a page without green."""
    (tmp_path / "metrics.jsonl").write_bytes(content)
    (tmp_path / "options.json").write_bytes(content)
    assert all(kind != "well" for kind, _ in verdicts(tmp_path))


def test_folders_with_nothing_to_draw_are_listed(tmp_path):
    """Scores and sampled pairs only: a page without green that names them."""
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/options.json").write_text(json.dumps(dataclasses.asdict(SamplePairsOptions())))
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/scored.jsonl").write_text("{}\n")
    page = Page(write_report(tmp_path))
    assert "No training run and no evaluation here." in page.text
    assert "Not shown: pairs (sampled pairs), scores (data)." in page.text
    assert not verdicts(tmp_path)


@pytest.mark.end_to_end
def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        scan(tmp_path / "elsewhere")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("milk\n")
    with pytest.raises(UserError, match=r"a.txt: is a file"):
        scan(tmp_path / "notes/a.txt")
    command = ["bash", str(REPOSITORY / "launch/report.sh"), "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: .: no output of this suite here or below; give the --output_dir")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    write_run(tmp_path / "run", SFTOptions(), SHORT)
    (tmp_path / "report").write_text("")
    with pytest.raises(UserError, match="report.*: (Not a directory|File exists)"):
        write_report(tmp_path)

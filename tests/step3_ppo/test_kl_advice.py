"""Advice on KL: every rule, its range, and its repetition."""

import json

import pytest

from common.training.train_state import TrainState
from step3_ppo import kl_advice as advice
from step3_ppo.kl_advice import JUMP, REMEMBERED, advise, kl_advice, warn_of_penalty
from step3_ppo.options import PPOOptions

RISING = [0.1 * i for i in range(REMEMBERED)]
NOISE = [0.3, -0.3] * (REMEMBERED // 2)
SWINGS = [6.0, 4.0, 6.5, 5.0, 7.0, 4.2, 6.9]


@pytest.mark.parametrize(
    "kl, reward, expected",
    [
        ([], [], {}),
        (RISING, RISING, {}),
        ([0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4], [0.0] * 7, {}),
        ([19.0, 20.5], [0.0, 1.0], {"far": ["KL is 20.5 nats", "unreliable", "raise --kl_coef (now 0.05"]}),
        ([1.0, 1.1, 1.2, 3.2], [0.0] * 4, {"jump": ["rose by 2.2", "raise --kl_coef", "--warmup_ratio"]}),
        ([0.0, 2.5], [0.0] * 2, {"jump": ["to 2.5"]}),
        (SWINGS, [0.0] * 7, {}),
        ([*SWINGS, 9.2], [0.0] * 8, {"jump": ["KL rose by 2.7 nats"]}),
        ([18.0] * JUMP + [22.0], [0.0] * 6, {"far": ["22.0"], "jump": ["4.0"]}),
        ([0.01] * REMEMBERED, NOISE, {"idle": ["below 0.1 nats", "flat", "lower --kl_coef"]}),
        ([0.01] * REMEMBERED, RISING, {}),
        ([0.01] * (REMEMBERED - 1), NOISE[1:], {}),
    ],
)  # fmt: skip
def test_kl_advice(kl, reward, expected):
    sentences = kl_advice(kl, reward, 0.05, PPOOptions())
    assert sentences.keys() == expected.keys()
    assert all(part in sentences[rule] for rule, parts in expected.items() for part in parts)


@pytest.mark.parametrize(
    ("kl", "kl_coef", "words", "part"),
    [
        ([0.0, 4.0], 0.005, {}, "raise --kl_coef (now 0.005; usual: 0.01 to 0.1)"),
        ([0.0, 4.0], 0.125, {}, "raise --kl_coef (now 0.125),"),
        ([0.01] * REMEMBERED, 0.125, {}, "lower --kl_coef (now 0.125; usual: 0.01 to 0.1)"),
        ([0.01] * REMEMBERED, 0.005, {}, "lower --kl_coef (now 0.005),"),
        ([0.01] * REMEMBERED, 0.0, {}, None),
        ([0.0, 4.0], 0.05, {"kl_target": 30.0}, "lower --kl_target (now 30; usual: 6 to 10)"),
        ([0.0, 4.0], 0.05, {"kl_target": 6.0}, "lower --kl_target (now 6),"),
        ([0.01] * REMEMBERED, 0.05, {"kl_target": 0.1}, "raise --kl_target (now 0.1; usual: 6 to 10)"),
    ],
)
def test_advice_names_the_option_and_its_usual_range(kl, kl_coef, words, part):
    options = PPOOptions(kl_controller="adaptive" if words else "fixed", **words)
    sentences = list(kl_advice(kl, [0.0] * len(kl), kl_coef, options).values())
    assert len(sentences) == (part is not None) and all(part in sentence for sentence in sentences)


def logged(monkeypatch, kls: list[float], **words) -> list[str]:
    """Lines logged for a curve at a flat score, in a run that is stopped and resumed after each step."""
    lines, state = [], TrainState()
    monkeypatch.setattr(advice, "log", lines.append)
    for step, kl in enumerate(kls, start=1):
        metrics = {"kl/mean": kl, "reward/mean": 0.0, "kl/coef": 0.05}
        advise(state, step, metrics, PPOOptions(**words))
        state = TrainState(**json.loads(json.dumps(state.plain())))
    return lines


def test_advice_is_not_repeated_at_once(monkeypatch):
    first, second = logged(monkeypatch, [float(kl) for kl in range(45)])
    assert first.startswith("step 4: KL rose by 3.0 ") and second.startswith("step 22: KL is 21.0 ")
    again = [*[1.0] * 10, 4.0, *[1.0] * (REMEMBERED + 5), 7.0]
    assert [line.split(":")[0] for line in logged(monkeypatch, again)] == ["step 11", "step 37"]


def test_critic_warmup_does_not_count_as_idle(monkeypatch):
    assert logged(monkeypatch, [0.0] * (30 + REMEMBERED - 1), critic_warmup_steps=30) == []
    (line,) = logged(monkeypatch, [0.0] * (30 + REMEMBERED), critic_warmup_steps=30)
    assert line.startswith(f"step {30 + REMEMBERED}: KL has stayed below")


@pytest.mark.parametrize(
    ("penalty", "spread", "ended", "normalised", "is_warned"),
    [
        (1.0, 0.4, 0.9, "off", True),
        (0.4, 0.4, 0.9, "off", True),
        (0.3, 0.4, 0.9, "off", False),
        (1.0, 0.4, 1.0, "off", False),  # no response is truncated
        (0.0, 0.0, 0.5, "off", False),
        (0.9, 0.4, 0.5, "sum", False),  # the spread of normalised scores is 1
        (0.9, 0.4, 0.9, "each", True),  # that of a weighted sum is not
    ],
)
def test_warning_of_a_penalty_that_outweighs_the_scores(
    penalty, spread, ended, normalised, is_warned, capsys
):
    metrics = {"reward/std": spread, "response/eos_rate": ended}
    warn_of_penalty(metrics, PPOOptions(missing_eos_penalty=penalty, normalise_scores=normalised))
    line = capsys.readouterr().out
    assert bool(line) == is_warned
    if is_warned:
        assert line.startswith(f"warning: --missing_eos_penalty {penalty:g} is as large")
        assert "deviation 0.4)" in line
        assert "10% of the responses" in line and "Use at most 0.2" in line

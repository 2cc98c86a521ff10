"""Advice about KL: each rule speaks where it should, and only there."""

import pytest

from step3_ppo.advice import REMEMBERED, kl_advice

RISING = [0.1 * i for i in range(REMEMBERED)]
NOISE = [0.3, -0.3] * (REMEMBERED // 2)


@pytest.mark.parametrize(
    "kl, reward, parts",
    [
        ([], [], []),
        (RISING, RISING, []),
        ([0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4], [0.0] * 7, []),
        ([19.0, 20.5], [0.0, 1.0], ["KL is 20.5 nats", "drifted", "raise --kl_coef (now 0.05"]),
        ([1.0, 1.1, 1.2, 3.2], [0.0] * 4, ["KL rose by 2.2 nats", "raise --kl_coef"]),
        ([0.01] * REMEMBERED, NOISE, ["below 0.1 nats", "flat", "lower --kl_coef"]),
        ([0.01] * REMEMBERED, RISING, []),
        ([0.01] * (REMEMBERED - 1), NOISE[1:], []),
    ],
)
def test_kl_advice(kl, reward, parts):
    said = kl_advice(kl, reward, 0.05)
    assert all(part in said for part in parts) and bool(said) == bool(parts)

"""The weight of the entropy bonus, by hand."""

import math

import pytest

from step3_ppo.entropy_band import adapted_coef, bonus_weight


@pytest.mark.parametrize(
    "coef, entropy, expected",
    [
        (0.01, 0.19, 0.015),
        (0.01, 0.2, 0.01),  # both ends belong to the band
        (0.01, 0.5, 0.01),
        (0.01, 0.51, 0.005),
        (0.002, 0.51, 0.0),
        (0.0, 0.1, 0.005),
        (0.01, math.nan, 0.01),
    ],
)
def test_the_band_by_hand(coef, entropy, expected):
    assert adapted_coef(coef, entropy, 0.2, 0.5, 0.005) == pytest.approx(expected)


@pytest.mark.parametrize("entropy, expected", [(0.1, 0.01), (0.5, 0.01), (0.51, 0.0), (math.nan, 0.01)])
def test_no_bonus_above_the_band(entropy, expected):
    assert bonus_weight(0.01, entropy, 0.5) == expected

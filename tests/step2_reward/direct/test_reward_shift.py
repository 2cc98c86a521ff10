"""The running mean of rewards that BCO subtracts."""

import math

from step2_reward.direct.reward_shift import RewardShift


def test_it_is_the_mean_over_steps_and_sides():
    shift = RewardShift.load({})
    assert shift.mean == 0 and shift.plain() == {}
    for chosen, rejected in ((1.0, -2.0), (4.0, 3.0), (math.nan, 1.0)):
        shift.add(chosen, rejected)
    assert math.isclose(shift.mean, (1 - 2 + 4 + 3) / 4)


def test_a_resumed_one_goes_the_same_way():
    one = RewardShift()
    for number in range(5):
        one.add(0.1 * number, -0.3)
        other = RewardShift.load(one.plain())
        assert other == one

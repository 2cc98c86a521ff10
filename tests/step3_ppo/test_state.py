"""The state of PPO, as checkpoints hold it."""

import pytest
import torch

from step3_ppo.options import PPOOptions
from step3_ppo.state import PPOState


def test_a_new_run_begins_with_the_options_and_saves_what_it_uses():
    state = PPOState.load(PPOOptions(kl_coef=0.2, kl_penalty="k3"), {})
    assert (state.kl.coef, state.kl.kind, state.kl.horizon) == (0.2, "k3", 0.0)
    assert state.plain() == {"kl_coef": 0.2}


def test_the_end_of_the_warmup_is_kept():
    options = PPOOptions(critic_warmup_steps=9, critic_warmup_until=0.5)
    state = PPOState.load(options, {})
    for step, share in enumerate((0.1, 0.6, 0.2, 0.7), start=1):
        state.adapt(options, step, {"kl/mean": 0.0, "value/explained_var": share})
        state = PPOState.load(options, state.plain())
        assert state.current(options).critic_warmup_steps == (9 if step == 1 else 2)


def test_the_coefficient_of_entropy_is_kept():
    """Above the band the bonus is off, and the coefficient falls; None: an iteration without an update."""
    options = PPOOptions(entropy_coef=0.02, entropy_low=0.2, entropy_high=0.5, entropy_coef_step=0.01)
    state = PPOState.load(options, {})
    assert state.current(options).entropy_coef == 0.02
    for entropy, expected in ((0.1, 0.03), (0.3, 0.03), (0.6, 0.0), (None, 0.0), (0.5, 0.02)):
        state.adapt(options, 1, {"kl/mean": 0.0} | ({"policy/entropy": entropy} if entropy else {}))
        state = PPOState.load(options, state.plain())
        assert state.current(options).entropy_coef == pytest.approx(expected)
        assert state.coefficients(state.current(options))["policy/entropy_coef"] == pytest.approx(expected)


def test_a_checkpoint_holds_every_number():
    options = PPOOptions(kl_controller="adaptive", kl_target=3.0, kl_horizon=500)
    state = PPOState.load(options, {})
    state.kl.update(30.0, 50)
    state.score_scale.update(torch.tensor([1.0, 4.0]))
    state.baseline, state.ptx_batches = 0.5, 7
    again = PPOState.load(options, state.plain())
    assert again == state and again.kl.coef > options.kl_coef and again.kl.target == 3.0

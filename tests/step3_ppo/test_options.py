"""Options that have no effect beside others are refused, or named in a warning."""

import pytest

from common.model.lora import NEEDS as NEEDS_OF_ADAPTERS
from common.model.lora import check_adapters
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import load_encoders
from common.runtime.option_checks import default_values, without_needed
from common.runtime.option_parser import parse_options
from common.runtime.options import LoraOptions, UserError
from step2_reward.ilql.options import ILQLOptions
from step3_ppo.best_of_n.options import BestOfNOptions
from step3_ppo.idle_options import ESTIMATORS, idle_options, warn_of_long_warmup
from step3_ppo.models import check_inputs
from step3_ppo.options import NEEDS, PPOOptions


@pytest.mark.parametrize(
    "command, words, message",
    [
        (
            PPOOptions,
            "--overlong_penalty 2",
            "--overlong_penalty 2.0: has no effect without --overlong_buffer",
        ),
        (PPOOptions, "--entropy_low 0.5", "--entropy_low 0.5: has no effect without --entropy_high"),
        (PPOOptions, "--entropy_coef_step 0.1", "without --entropy_high"),
        (PPOOptions, "--ptx_coef 2", "without --ptx_data"),
        (PPOOptions, "--process_weight 2", "without --process_model_name_or_path"),
        (PPOOptions, "--critic_warmup_until 0.5", "without --critic_warmup_steps"),
        (PPOOptions, "--policy_loss cispo --dual_clip 4", "--dual_clip 4.0: --policy_loss cispo has no dual"),
        (PPOOptions, "--mask_truncated --bootstrap_truncated", "--mask_truncated leaves truncated responses"),
        (
            PPOOptions,
            "--share_prompts yes --micro_batch_tokens 80 --max_prompt_length 64 --max_response_length 9"
            " --samples_per_prompt 4 --global_batch_size 8",
            "--micro_batch_tokens 80 must be at least 82, for a prompt",
        ),
        (BestOfNOptions, "--process_weight 2", "without --process_model_name_or_path"),
        (BestOfNOptions, "--process_aggregation min", "--process_aggregation min: has no effect without"),
        (ILQLOptions, "--beta 1 --awac_scale 0", "--beta 1.0: has no effect without --awac_scale"),
    ],
)
def test_idle_options_are_refused(command, words, message):
    with pytest.raises(UserError) as caught:
        parse_options(command, words.split(), check_required=False)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "command, words",
    [
        (PPOOptions, "--overlong_penalty 2 --overlong_buffer 4"),
        (PPOOptions, "--entropy_low 0.5 --entropy_high 0.6 --entropy_coef_step 0.1"),
        (PPOOptions, "--policy_loss cispo --dual_clip 0"),
        (PPOOptions, "--policy_loss gspo --dual_clip 4 --ptx_data F --ptx_coef 2"),
        (PPOOptions, "--normalise_scores each --process_model_name_or_path P"),  # a script adds a model
        (BestOfNOptions, "--process_weight 2 --process_aggregation min --process_model_name_or_path P"),
        (ILQLOptions, "--beta 1"),
    ],
)
def test_options_with_those_that_they_need(command, words):
    parse_options(command, words.split(), check_required=False)


def test_scores_of_steps_alone_are_not_normalised():
    options = PPOOptions(process_model_name_or_path="P", normalise_scores="sum")
    with pytest.raises(UserError, match="--normalise_scores sum: .* it needs a reward model or function"):
        check_inputs(options)


def test_tables_name_options():
    names = default_values(PPOOptions()).keys()
    assert names >= {*NEEDS, *NEEDS.values(), *ESTIMATORS, *NEEDS_OF_ADAPTERS, *NEEDS_OF_ADAPTERS.values()}


@pytest.mark.parametrize("option", [{"lora_alpha": 8.0}, {"lora_target_modules": ["q_proj"]}])
def test_options_of_adapters_need_adapters(option, capsys):
    check_adapters("", LoraOptions())
    assert not capsys.readouterr().out
    check_adapters("", LoraOptions(**option))
    assert f"warning: --{[*option][0]} " in (out := capsys.readouterr().out)
    assert "has no effect without --lora_rank" in out
    assert without_needed(LoraOptions(lora_rank=4, **option), NEEDS_OF_ADAPTERS) == []


def test_the_coefficient_of_a_deviation_needs_one():
    assert load_encoders(EnsembleOptions(reward_std_coef=2.0, reward_combine="mean_std")) == []
    with pytest.raises(UserError, match="--reward_std_coef 2: not used by --reward_combine min"):
        load_encoders(EnsembleOptions(reward_std_coef=2.0, reward_combine="min"))


def test_options_of_other_estimators_are_named():
    assert idle_options(PPOOptions()) == []
    changed = {
        "gae_lambda": 0.9, "gamma": 0.9, "whiten_advantages": False, "critic_learning_rate": 1e-3,
        "value_clip_range": 1.0, "reinforce_baseline": "moving", "group_std": False,
    }  # fmt: skip
    assert changed.keys() == ESTIMATORS.keys()

    def named(**options) -> list[str]:
        return [reason.split()[0][2:] for reason in idle_options(PPOOptions(**changed | options))]

    assert {*named()} == {"reinforce_baseline", "group_std"}
    for estimator, used in {
        "reinforce": {"gamma", "reinforce_baseline"}, "reinforce_pp": {"gamma"}, "group": {"group_std"},
        "rloo": set(),
    }.items():  # fmt: skip
        assert {*named(advantage_estimator=estimator)} == changed.keys() - used


@pytest.mark.parametrize(
    "options, iterations, is_warned",
    [
        ({}, 1, False),
        ({"critic_warmup_steps": 4}, 5, False),
        ({"critic_warmup_steps": 5}, 5, True),
        ({"critic_warmup_steps": 9, "critic_warmup_until": 0.3}, 5, False),
    ],
)
def test_a_warmup_of_the_critic_as_long_as_the_run_gets_a_warning(options, iterations, is_warned, capsys):
    warn_of_long_warmup(PPOOptions(**options), iterations)
    out = capsys.readouterr().out
    assert ("all 5 iterations train the critic alone" in out) == is_warned == bool(out)


def test_targets_without_a_controller_and_a_lambda_that_two_others_replace_are_named():
    target = {"kl_target": 3.0, "kl_horizon": 500}
    fixed = ["--kl_target with --kl_controller fixed", "--kl_horizon with --kl_controller fixed"]
    assert idle_options(PPOOptions(**target)) == fixed
    assert idle_options(PPOOptions(**target, kl_controller="adaptive")) == []
    both = {"length_adaptive_lambda": 0.05, "critic_gae_lambda": 1.0}
    replaced = "--gae_lambda with --length_adaptive_lambda and --critic_gae_lambda"
    assert idle_options(PPOOptions(gae_lambda=0.9, **both)) == [replaced]
    for name, value in both.items():
        assert idle_options(PPOOptions(gae_lambda=0.9, **{name: value})) == []

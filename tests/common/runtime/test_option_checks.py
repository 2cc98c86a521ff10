"""Options changed between a run and its resumption."""

import json

import pytest

from common.runtime.option_checks import (
    changed_defaults,
    changed_options,
    default_values,
    free_to_change,
    resolved,
    resume_kinds,
    with_new_names,
)
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from common.training.run_folder import check_folder
from step1_sft.options import SFTOptions
from step2_reward.direct.options import DirectOptions
from step2_reward.options import RewardOptions
from step3_ppo.options import PPOOptions


def direct(*words: str) -> dict:
    return resolved(parse_options(DirectOptions, list(words), check_required=False))


def changes(earlier: dict, current: dict) -> list[str]:
    return changed_options(earlier, current, default_values(DirectOptions()), free_to_change(DirectOptions()))


def test_options_set_by_another_option_are_not_listed():
    assert changes(direct(), direct("--loss", "simpo")) == ["--loss dpo -> simpo"]
    both = direct("--loss", "simpo", "--beta", "3")
    assert changes(direct(), both) == ["--beta 0.1 -> 3.0", "--loss dpo -> simpo"]


def test_given_value_equal_to_the_default_is_no_change():
    assert changes(direct(), direct("--beta", "0.1", "--seed", "0")) == []


def test_option_missing_in_the_second_command_is_a_change():
    assert changes(direct("--seed", "7"), direct()) == ["--seed 7 -> 0"]
    assert changes(direct("--lora_target_modules", "q", "k"), direct()) == [
        "--lora_target_modules q k -> all-linear"
    ]
    assert changes(direct("--max_steps", "7"), direct()) == [], "free"


def test_options_unknown_to_another_version():
    """A new option is a change only if it is given with another value than its default."""
    earlier = direct()
    del earlier["nll_coef"]
    assert (
        changes(earlier, direct()) == changes(earlier, direct("--loss", "cpo", "--nll_coef", "1"))[1:] == []
    )
    assert changes(earlier, direct("--nll_coef", "2", "--loss", "cpo"))[1:] == ["--nll_coef 1.0 -> 2.0"]
    assert changes(direct() | {"gone": 3}, direct()) == [], "not given"
    del earlier["given"]  # an older version without this key
    assert changes(earlier, direct("--seed", "3")) == ["--seed 0 -> 3"]


def test_a_run_from_when_the_option_was_a_switch():
    options = parse_options(PPOOptions, ["--normalise_scores", "sum"], check_required=False)
    earlier = resolved(options) | {"normalise_scores": True}
    assert with_new_names(earlier, options)["normalise_scores"] == "sum"
    assert with_new_names(earlier | {"normalise_scores": False}, options)["normalise_scores"] == "off"
    assert with_new_names(earlier, options) == resolved(options) == with_new_names(resolved(options), options)


def test_changed_default_is_named_with_the_fix(tmp_path):
    options = parse_options(SFTOptions, ["--output_dir", str(tmp_path)], check_required=False)
    earlier = resolved(options) | {"adam_beta2": 0.999, "logging_steps": 3}
    assert changed_defaults(earlier, resolved(options), free_to_change(options)) == ["--adam_beta2 0.999"]
    (tmp_path / "options.json").write_text(json.dumps(earlier))
    with pytest.raises(UserError, match="started with other defaults; to resume it, add --adam_beta2 0.999$"):
        check_folder(options)
    words = ["--output_dir", str(tmp_path), "--adam_beta2", "0.999"]
    check_folder(parse_options(SFTOptions, words, check_required=False))


def test_missing_checkpoint_folder_is_refused_before_data_is_read(tmp_path):
    words = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", str(tmp_path / "step_9")]
    with pytest.raises(UserError, match="step_9: no such folder"):
        check_folder(parse_options(SFTOptions, words, check_required=False))


STAGES = {
    SFTOptions: {"eval/loss"},
    RewardOptions: {"eval/loss", "eval/accuracy"},
    DirectOptions: {"eval/loss", "eval/accuracy"},
    PPOOptions: {"eval/score", "eval/gold"},
}


@pytest.mark.parametrize("options_class", STAGES)
def test_best_metric_is_a_metric_of_the_stage(options_class):
    for metric in {"none"}.union(*STAGES.values()):
        words = ["--best_metric", metric]
        words += ["--reward_function", "f.py:f", "--gold_function", "f.py:f"] * (options_class is PPOOptions)
        if metric in STAGES[options_class] | {"none"}:
            assert parse_options(options_class, words, check_required=False).best_metric == metric
        else:
            with pytest.raises(UserError, match=f"--best_metric.*'{metric}' .choose from 'none', "):
                parse_options(options_class, words, check_required=False)


def test_best_metric_needs_held_out_data():
    words = ["--best_metric", "eval/loss", "--eval_fraction", "0"]
    with pytest.raises(UserError, match="--best_metric eval/loss: needs held-out data"):
        parse_options(SFTOptions, words, check_required=False)
    parse_options(SFTOptions, [*words, "--eval_data", "a.jsonl"], check_required=False)


def test_an_option_binds_a_resumed_run_alike_in_every_stage():
    """Also where a stage declares it anew, with another default or help text."""
    kinds = set().union(*(resume_kinds(stage).items() for stage in STAGES))
    names = [name for name, _ in kinds]
    assert len(names) == len(set(names))
    assert {"learning_rate", "seed", "lora_rank", "global_batch_size"} & free_to_change(SFTOptions) == set()
    assert {"save_steps", "micro_batch_size", "train_data", "zero_config"} <= free_to_change(SFTOptions)


def test_a_run_of_a_version_with_an_older_name_is_resumed_under_the_new_names():
    def ppo(*words: str) -> PPOOptions:
        return parse_options(PPOOptions, ["--reward_function", "f.py:f", *words], check_required=False)

    options = ppo("--kl_target", "0.5", "--max_update_kl", "0.5")
    earlier = {
        name: value for name, value in resolved(options).items() if name not in ("kl_target", "max_update_kl")
    }
    earlier |= {"target_kl": 0.5, "given": ["reward_function", "target_kl"]}
    same = with_new_names(earlier, options)
    assert "target_kl" not in same and same["given"] == ["kl_target", "max_update_kl", "reward_function"]
    assert changed_options(same, resolved(options), default_values(options), set()) == []
    other = resolved(ppo("--kl_target", "0.5"))
    assert changed_options(same, other, default_values(options), set()) == ["--max_update_kl 0.5 -> 6.0"]

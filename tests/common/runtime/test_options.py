"""Command line: values, help, and one-line errors."""

import dataclasses
from importlib import import_module

import pytest

from common.runtime.option_checks import rows_per_micro_batch
from common.runtime.option_parser import _metavar, given_options, parse_options
from common.runtime.options import OptimiserOptions, TrainOptions, UserError, reason
from launch.lib.check_options import COMMANDS
from step1_sft.options import SFTOptions
from step2_reward.options import RewardOptions
from step3_ppo.options import PPOOptions

REQUIRED = ["model_name_or_path", "train_data"]
GOOD = ["--model_name_or_path", "m", "--train_data", "a.jsonl", "b.csv"]


def parse(*extra: str, given: list[str] = GOOD) -> SFTOptions:
    return parse_options(SFTOptions, [*given, *extra])


def test_values_are_typed_and_lists_are_lists():
    options = parse("--learning_rate", "1e-3", "--skip_bad_records", "--max_steps=7")
    assert options.train_data == ["a.jsonl", "b.csv"]
    assert (options.learning_rate, options.skip_bad_records, options.max_steps) == (1e-3, True, 7)
    assert options.global_batch_size == 32


@pytest.mark.parametrize(
    "extra, parts",
    [
        (["--lerning_rate", "1"], ["--lerning_rate", "did you mean --learning_rate?"]),
        (["--learning", "1"], ["unknown option --learning"]),  # no abbreviations
        (["--zzz"], ["--zzz", "--help lists all options"]),
        (["--epochs", "3"], ["--epochs", "did you mean --num_train_epochs?"]),
        (["--config", "3"], ["--config", "did you mean --zero_config?"]),
        (["--overlap", "drop"], ["--overlap", "did you mean --overlong?"]),
        (["--over", "drop"], ["--over", "did you mean --overlong?"]),
        (["--max_steps", "many"], ["--max_steps", "'many'", "int"]),
        (["--learning_rate", "fast"], ["--learning_rate", "'fast'", "float"]),
        (["--skip_bad_records", "perhaps"], ["--skip_bad_records", "perhaps"]),
        (["--lr_scheduler_type", "square"], ["--lr_scheduler_type", "square", "cosine", "linear"]),
        (["--loss_on", "prompt"], ["--loss_on", "prompt_and_response"]),
        (["--report_to", "tensorboard", "tb"], ["--report_to", "'tb'", "tensorboard", "none"]),
        (["--report_to", "none", "tensorboard"], ["--report_to none tensorboard", "none excludes"]),
        (["--max_steps"], ["--max_steps", "expected one argument"]),
        (["--max_steps", "-1"], ["--max_steps -1", "at least 0"]),
        (["--learning_rate", "0"], ["--learning_rate 0", "above 0"]),
        (["--learning_rate", "nan"], ["--learning_rate nan", "above 0"]),
        (["--eval_fraction", "0.95"], ["--eval_fraction 0.95", "at most 0.9"]),
        (["--max_length", "7"], ["--max_length 7", "at least 8"]),
        (["--micro_batch_size", "0"], ["--micro_batch_size 0", "at least 1"]),
    ],
)
def test_invalid_value_is_one_line_with_the_value_and_what_is_allowed(extra, parts):
    with pytest.raises(UserError) as error:
        parse(*extra)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("words", "choice"),
    [
        ([], "off"), (["--normalise_scores", "each"], "each"), (["--normalise_scores=sum"], "sum"),
        (["--normalise_scores"], "sum"), (["--normalise-scores", "True"], "sum"),
        (["--normalise_scores", "no", "--seed", "1"], "off"), (["--normalise_scores", "--seed", "1"], "sum"),
    ],
)  # fmt: skip
def test_a_former_switch_still_takes_true_and_false(words, choice):
    assert parse_options(PPOOptions, words, check_required=False).normalise_scores == choice
    with pytest.raises(UserError, match="invalid choice: 'maybe' .*off.*sum.*each"):
        parse_options(PPOOptions, ["--normalise_scores", "maybe"], check_required=False)


def test_an_infinite_learning_rate_is_refused():
    with pytest.raises(UserError, match="--learning_rate inf"):
        parse("--learning_rate", "inf")


def test_a_seed_may_have_32_bits():
    assert parse("--seed", str(2**32 - 1)).seed == 2**32 - 1
    with pytest.raises(UserError, match="--seed 4294967296: must be at most 4294967295"):
        parse("--seed", str(2**32))


@pytest.mark.parametrize("missing", REQUIRED)
def test_missing_option_is_named(missing):
    given = [["--model_name_or_path", "m"], ["--train_data", "f"]]
    remaining = [word for words in given if words[0] != f"--{missing}" for word in words]
    with pytest.raises(UserError, match=f"--{missing} is required"):
        parse(given=remaining)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "rows"),
    [
        (32, 4, 1, 4),
        (32, 4, 8, 4),
        (32, 4, 16, 2),
        (32, 32, 8, 4),
        (96, 5, 8, 4),
        (30, 4, 3, 2),
        (7, 4, 1, 1),
    ],
)
def test_micro_batch_divides_the_part_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, global_batch: int, micro_batch: int, ranks: int, rows: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    options = OptimiserOptions(global_batch_size=global_batch, micro_batch_size=micro_batch)
    assert rows_per_micro_batch(options) == rows
    assert global_batch % (rows * ranks) == 0


@pytest.mark.parametrize(
    "changed, parts",
    [
        ({"global_batch_size": 48}, ["--rollout_batch_size 128", "--global_batch_size 48"]),
        ({"samples_per_prompt": 3}, ["--rollout_batch_size 128", "--samples_per_prompt 3"]),
    ],
)
def test_rollout_size_must_be_divisible(changed, parts):
    PPOOptions(reward_function=["f.py:f"]).check()
    with pytest.raises(UserError) as error:
        PPOOptions(reward_function=["f.py:f"], **changed).check()
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("options_class", [TrainOptions, SFTOptions, RewardOptions, PPOOptions])
def test_defaults_are_within_their_limits_and_lists_are_not_shared(options_class):
    words = ["--reward_function", "f.py:f"] if options_class is PPOOptions else []
    first, second = (parse_options(options_class, words, check_required=False) for _ in range(2))
    assert first == second
    first.eval_data.append("x")
    assert second.eval_data == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n\n  first \nsecond"), "first"), (IndexError(), "IndexError"),
        (OSError(" \n"), "OSError"), (RuntimeError("alone"), "alone"),
        (KeyError("rope_scaling"), "KeyError: 'rope_scaling'"),
    ],
)  # fmt: skip
def test_the_reason_of_an_error_is_one_line_and_never_empty(error, line):
    assert reason(error) == line


def test_help_shows_each_option_once_required_ones_first_with_default_and_limits(capsys):
    with pytest.raises(SystemExit) as end:
        parse_options(PPOOptions, ["--help"], usage="bash launch/step3_ppo.sh [options]")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and text.startswith("usage: bash launch/step3_ppo.sh [options]")
    for field in dataclasses.fields(PPOOptions):
        assert text.count(f" --{field.name} {_metavar(field)}") == 1, field.name
    assert text.index("Required: ") < text.index("--actor_model_name_or_path MODEL") < text.index("--seed N")
    assert "(default 0.05; at least 0)" in text and "turn off with --no_whiten_advantages" in text
    assert "--learning-rate" not in text and "(default )" not in text and "(default [])" not in text


def test_a_switch_is_turned_off_by_its_name_with_no_and_dashes_are_underscores():
    words = ["--reward-function", "f.py:f", "--no_whiten_advantages", "--no-group-std"]
    options = parse_options(PPOOptions, words, check_required=False)
    assert options.reward_function == ["f.py:f"] and not options.whiten_advantages and not options.group_std
    with pytest.raises(UserError, match="--skip_bad_records: must be true or false, not 'perhaps'"):
        parse("--skip_bad_records", "perhaps")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_is_printed_as_it_is_written(command, capsys):
    module, _, name = COMMANDS[command].rpartition(".")
    options_class = getattr(import_module(module), name)
    with pytest.raises(SystemExit) as end:
        parse_options(options_class, ["--help"])
    printed = "".join(capsys.readouterr().out.split())  # lines are also broken after hyphens
    assert not end.value.code
    for field in dataclasses.fields(options_class):
        assert "".join(field.metadata["help"].split()) in printed


def test_given_options_are_those_on_the_command_line():
    parse("--seed=0", "--packing", "false")
    assert given_options() == {"model_name_or_path", "train_data", "seed", "packing"}


@pytest.mark.parametrize("old_name", ["--target_kl", "--target-kl"])
def test_an_old_name_sets_what_has_taken_its_place(old_name, capsys, monkeypatch):
    words = ["--reward_function", "f.py:f", old_name, "0.5"]
    options = parse_options(PPOOptions, words, check_required=False)
    assert (options.kl_target, options.max_update_kl) == (0.5, 0.5)
    assert {"kl_target", "max_update_kl"} <= given_options() and "target_kl" not in given_options()
    assert not capsys.readouterr().out, "the check before a run"
    monkeypatch.setenv("RANK", "0")
    parse_options(PPOOptions, words, check_required=False)
    assert capsys.readouterr().out == f"{old_name} is an old name: it sets --kl_target and --max_update_kl\n"

"""Refusals of ranks that share rows; tests/end_to_end/test_sequence_parallel.py has the numbers."""

from collections.abc import Iterator

import pytest
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from common.model.sequence_parallel import check_heads
from common.model.zero import load_zero_config
from common.runtime.options import UserError
from common.runtime.row_groups import data_ranks, share_rows_among
from launch.lib.check_options import check_command
from step1_sft.options import SFTOptions


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WORLD_SIZE", "4")
    yield
    share_rows_among(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True}, "--sequence_parallel 2: not with --packing"),
        ({"attn_implementation": "varlen"}, "--attn_implementation is varlen; allowed: auto or sdpa"),
    ],
)
def test_options(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SFTOptions(**{"sequence_parallel": 2} | changes).check()


def test_groups_divide_the_ranks() -> None:
    with pytest.raises(UserError, match="--sequence_parallel 3: must divide the number of ranks, 4"):
        share_rows_among(3)


def test_options_are_checked_before_there_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE")
    check_command("step1_sft", ["--model_name_or_path", "M", "--train_data", "F", "--sequence_parallel", "2"])


def test_global_batch_is_divided_by_groups() -> None:
    share_rows_among(2)
    assert data_ranks() == 2
    load_zero_config("", SFTOptions(global_batch_size=6), 1e-5)
    with pytest.raises(UserError, match="5 is not a multiple of the 2 ranks / --sequence_parallel"):
        load_zero_config("", SFTOptions(global_batch_size=5), 1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(hidden_size=96, num_attention_heads=6), "must divide the 6 num_attention_heads of M"),
        (LlamaConfig(num_key_value_heads=2), "must divide the 2 num_key_value_heads of M"),
        (MistralConfig(), "M has layers other than full attention and a dense MLP"),
        (MixtralConfig(), "M has layers other than full attention and a dense MLP"),
        (Qwen3NextConfig(num_key_value_heads=4), "M has layers other than full attention and a dense MLP"),
    ],
)
def test_models(config: PretrainedConfig, message: str) -> None:
    share_rows_among(4)
    with pytest.raises(UserError, match=f"^--sequence_parallel 4: {message}"):
        check_heads(config, "M")
    share_rows_among(1)
    check_heads(config, "M")


@pytest.mark.parametrize("config", [LlamaConfig(), Qwen2Config(), Qwen3Config()])
def test_models_that_can(config: PretrainedConfig) -> None:
    share_rows_among(4)
    check_heads(config, "M")

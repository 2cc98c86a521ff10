"""DeepSpeed JSON: shipped files load, "auto" is filled in, and contradictions are errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from common.model.engine import _adamw
from common.model.zero import CONFIG_FOLDER, fill_bucket_sizes, frozen_config, load_zero_config, unpartitioned
from common.runtime.options import TrainOptions, UserError

OPTIONS = TrainOptions(global_batch_size=32, micro_batch_size=4, max_grad_norm=1.0, weight_decay=0.1)
SHIPPED = ["zero0", "zero1", "zero1_nodes", "zero2", "zero2_offload", "zero3", "zero3_nodes", "zero3_offload"]
HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.fixture(autouse=True)
def one_rank_on_a_cpu(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("common.model.zero.on_cpu", lambda: True)


def load(folder: Path, content: dict, options: TrainOptions = OPTIONS) -> dict:
    path = folder / "zero.json"
    path.write_text(json.dumps(content))
    return load_zero_config(str(path), options, learning_rate=1e-5)


def refusal(folder: Path, content: dict, options: TrainOptions = OPTIONS) -> str:
    with pytest.raises(UserError) as error:
        load(folder, content, options)
    message = str(error.value)
    assert "zero.json" in message and "\n" not in message
    return message


def stage(number: int, **more) -> dict:
    return {"zero_optimization": {"stage": number}, **more}


def test_all_shipped_files_are_tested():
    assert sorted(path.stem for path in CONFIG_FOLDER.glob("*.json")) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_loads_without_autos(name):
    config = load_zero_config(str(CONFIG_FOLDER / f"{name}.json"), OPTIONS, learning_rate=1e-5)
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_clipping"] == 1.0
    assert not config.get("bf16", {}).get("enabled"), "a CPU trains in fp32"
    fill_bucket_sizes(config, hidden_size=64)
    assert '"auto"' not in json.dumps(config)


def test_accumulation_is_done_outside_deepspeed(tmp_path, monkeypatch):
    """DeepSpeed sees one micro-batch per step; Triptych sets the accumulation boundary."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load(tmp_path, stage(2))
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 1
    assert config["train_batch_size"] == 8


def test_default_file():
    assert load_zero_config("", OPTIONS, learning_rate=1e-5)["zero_optimization"]["stage"] == 0


def test_auto_bf16_follows_the_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr("common.model.zero.on_cpu", lambda: False)
    for has_bf16 in (True, False):
        monkeypatch.setattr("common.model.zero._has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert load(tmp_path, stage(2, bf16={"enabled": "auto"}))["bf16"]["enabled"] is has_bf16
        assert load(tmp_path, stage(0, bf16={"enabled": "auto"}))["bf16"]["enabled"] is False


def test_a_hugging_face_file_is_accepted(tmp_path):
    config = load(tmp_path, HUGGING_FACE)
    assert not {"optimizer", "scheduler"} & config.keys()
    assert config["zero_optimization"]["sub_group_size"] == 1e9
    assert config["steps_per_print"] == 2000


def test_values_equal_to_the_options_are_accepted(tmp_path):
    params = {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    same = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": params},
    }
    load(tmp_path, stage(1, **same))


def test_a_number_of_tokens_leaves_the_number_of_sequences_open(tmp_path, monkeypatch):
    options = replace(OPTIONS, micro_batch_tokens=512)
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = load(tmp_path, stage(1, train_batch_size=32, train_micro_batch_size_per_gpu="auto"), options)
    assert config["train_micro_batch_size_per_gpu"] * 4 == config["train_batch_size"]
    assert config["gradient_accumulation_steps"] == 1
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        message = refusal(tmp_path, stage(1, **{name: 4}), options)
        assert f"{name} is 4" in message and "--micro_batch_tokens" in message


@pytest.mark.parametrize(("size", "ranks"), [(8, 4), (8, 16), (1, 3), (8, 12), (2, 3)])
def test_ranks_of_a_node_divide_all_ranks(tmp_path, monkeypatch, size, ranks):
    """DeepSpeed asserts it when the first model is loaded."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    options = replace(OPTIONS, global_batch_size=48, micro_batch_size=1)
    config = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size}}
    if (size, ranks) in ((8, 12), (2, 3)):
        message = refusal(tmp_path, config, options)
        assert f"zero_hpz_partition_size is {size}; it must divide the {ranks} ranks" in message
    else:
        load(tmp_path, config, options)


@pytest.mark.parametrize("tokens", [0, 512])
def test_a_global_batch_is_a_multiple_of_the_ranks(tmp_path, monkeypatch, tokens):
    options = replace(OPTIONS, micro_batch_tokens=tokens)
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="--global_batch_size 32 is not a multiple of the 5 ranks"):
        load(tmp_path, stage(1), options)


def adamw(**params) -> dict:
    return {"optimizer": {"type": "AdamW", "params": params}}


WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}


@pytest.mark.parametrize(
    "content, parts",
    [
        ({"train_batch_size": 64}, ["train_batch_size is 64", "--global_batch_size is 32"]),
        ({"train_micro_batch_size_per_gpu": 2}, ["size_per_gpu is 2", "--micro_batch_size is 4"]),
        ({"gradient_accumulation_steps": 2}, ["accumulation_steps is 2", "--global_batch_size", "is 8"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "--max_grad_norm is 1.0"]),
        (adamw(lr=1e-3), ["optimizer.params.lr is 0.001", "1e-05"]),
        (adamw(betas=[0.9, 0.999]), ["optimizer.params.betas", "0.999", "0.95"]),
        (adamw(weight_decay=0.0), ["optimizer.params.weight_decay is 0.0", "0.1"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type is 'Lamb'", "AdamW"]),
        (WARMUP, ["scheduler", "--lr_scheduler_type"]),
    ],
)
def test_a_contradiction_names_both_sides(tmp_path, content, parts):
    message = refusal(tmp_path, stage(2, **content))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("value", [4, -1, "auto", "2", None])
def test_an_unknown_stage_is_refused(tmp_path, value):
    assert "zero_optimization.stage" in refusal(tmp_path, stage(value))


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_16_bit_precision_at_stage_0_is_refused(tmp_path, name):
    assert f"{name} needs ZeRO stage 1" in refusal(tmp_path, stage(0, **{name: {"enabled": True}}))
    assert load(tmp_path, stage(1, **{name: {"enabled": True}}))[name]["enabled"] is True


def test_a_misspelt_key_is_refused_with_a_suggestion(tmp_path):
    message = refusal(tmp_path, stage(1, gradient_cliping=1.0))
    assert "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?" in message


@pytest.mark.parametrize(
    "content, name",
    [
        (stage(1, prescale_gradients="auto"), "prescale_gradients"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, "zero_optimization.sub_group_size"),
        (stage(1, fp16={"enabled": "auto", "loss_scale": "auto"}), "fp16.loss_scale"),
    ],
)
def test_an_auto_without_an_option_is_refused(tmp_path, content, name):
    assert f'{name} cannot be "auto"' in refusal(tmp_path, content)


@pytest.mark.parametrize("section", ["zero_optimization", "bf16", "optimizer", "scheduler"])
def test_a_section_that_is_not_an_object_is_refused(tmp_path, section):
    assert section in refusal(tmp_path, {**stage(1), section: "auto"})


@pytest.mark.parametrize("params", [[], None, "auto"])
def test_params_that_are_not_an_object_are_refused(tmp_path, params):
    assert "optimizer.params is" in refusal(tmp_path, stage(1, optimizer={"type": "Adam", "params": params}))
    assert "scheduler.params is" in refusal(tmp_path, stage(1, scheduler={"params": params}))


def test_the_error_names_an_unreadable_file(tmp_path):
    with pytest.raises(UserError, match="absent.json: No such file"):
        load_zero_config(str(tmp_path / "absent.json"), OPTIONS, learning_rate=1e-5)
    (tmp_path / "broken.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(UserError, match=r"broken.json:3: not valid JSON"):
        load_zero_config(str(tmp_path / "broken.json"), OPTIONS, learning_rate=1e-5)
    (tmp_path / "other.json").write_text("{}", encoding="utf-16")
    with pytest.raises(UserError, match="other.json: not UTF-8 text"):
        load_zero_config(str(tmp_path / "other.json"), OPTIONS, learning_rate=1e-5)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="list.json: must hold one JSON object"):
        load_zero_config(str(tmp_path / "list.json"), OPTIONS, learning_rate=1e-5)


def test_frozen_models_are_partitioned_at_stage_3_only(tmp_path):
    assert frozen_config(load(tmp_path, stage(2))) is None
    trained = load(tmp_path, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    frozen = frozen_config(trained)
    assert frozen["zero_optimization"] == {"stage": 3}
    assert "offload_optimizer" in trained["zero_optimization"], (
        "the trained model's configuration is unchanged"
    )
    assert unpartitioned(trained)["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize("section", [None, {}, {"device": "none"}, {"device": "none", "pin_memory": True}])
@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_an_offload_without_a_device_is_off(tmp_path, monkeypatch, name, section):
    """The optimiser stays on the GPU; offloaded frozen models are still in host memory."""
    monkeypatch.setattr("common.model.engine.on_cpu", lambda: False)
    config = load(tmp_path, {"zero_optimization": {"stage": 3, name: section}})
    assert name not in config["zero_optimization"]
    optimiser = _adamw(torch.nn.Linear(2, 2), config, OPTIONS, 1e-3)
    assert type(optimiser) is torch.optim.AdamW
    assert frozen_config(config, offload=True)["zero_optimization"]["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize("section", [{}, {"device": "none"}, {"device": None}, {"device": "cpu"}])
def test_gpu_runs_with_optimiser_offload_use_deepspeeds_adamw(monkeypatch, section):
    monkeypatch.setattr("common.model.engine.on_cpu", lambda: False)
    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", lambda *_, **__: "on the host")
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": section}}
    adamw = _adamw(nn.Linear(2, 2), config, OPTIONS, 1e-3)
    assert (adamw == "on the host") == (section == {"device": "cpu"})


def test_an_offload_section_with_a_device_is_off_only_at_stage_0(tmp_path):
    section = {"device": "cpu", "pin_memory": True}
    config = load(tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": section}})
    assert config["zero_optimization"]["offload_optimizer"] == section
    assert load(tmp_path, {"zero_optimization": {"stage": 0, "offload_optimizer": section}}) == load(
        tmp_path, stage(0)
    )


@pytest.mark.parametrize("section", [True, "cpu", "none", ["cpu"], {"device": "gpu"}])
def test_an_invalid_offload_section_is_refused(tmp_path, section):
    message = refusal(tmp_path, {"zero_optimization": {"stage": 3, "offload_optimizer": section}})
    assert "zero_optimization.offload_optimizer" in message and "none, cpu, nvme" in message


def test_auto_bucket_sizes_follow_the_hidden_size(tmp_path):
    config = load(tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto",
                                                   "stage3_prefetch_bucket_size": 77}})  # fmt: skip
    fill_bucket_sizes(config, hidden_size=64)
    assert config["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 64 * 64, "stage3_prefetch_bucket_size": 77,
    }  # fmt: skip

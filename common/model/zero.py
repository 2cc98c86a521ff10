"""Read a DeepSpeed JSON, fill in the values that options own, and refuse contradictions.

The JSON owns ZeRO stage, offload, precision and communication. Options own batch sizes, accumulation,
clipping, AdamW and the schedule. In the JSON these are "auto" or absent; a different value is an error and
never overrides an option.
"""

import copy
import difflib
from pathlib import Path
from typing import Any

import torch

from common.model.deepspeed_check import check_config, check_paging
from common.model.model_files import check_attention
from common.runtime.distributed import on_cpu
from common.runtime.files import parse_json
from common.runtime.option_checks import rows_per_micro_batch
from common.runtime.options import InferenceOptions, OptimiserOptions, UserError, world_size
from common.runtime.row_groups import data_ranks
from common.text.fields import shown

CONFIG_FOLDER = Path(__file__).parents[1] / "zero_configs"

# DeepSpeed silently accepts a misspelt top-level key; Triptych refuses it.
KNOWN_KEYS = [
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "torch_autocast",
    "amp", "data_types", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "sparse_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print",
    "wall_clock_breakdown", "dump_state", "memory_breakdown", "comms_logger", "flops_profiler",
    "tensorboard", "csv_monitor", "wandb", "comet", "activation_checkpointing", "aio", "checkpoint",
    "compile", "disable_allgather", "seed",
    "gradient_allreduce_op", "dataloader_drop_last", "seq_parallel_communication_data_type",
]  # fmt: skip
DEEPEST = 10  # levels of objects
LARGEST = 1e18  # what fits in 64 bits
SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")
SECTIONS = ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16")


def load_inference_config(options: InferenceOptions) -> dict[str, Any]:
    """Load the DeepSpeed configuration of models that are not trained, checked as one for training."""
    as_trained = OptimiserOptions(
        global_batch_size=world_size(), micro_batch_size=1, attn_implementation=options.attn_implementation
    )
    return load_zero_config(options.zero_config, as_trained, learning_rate=1e-5)


def load_zero_config(path: str, options: OptimiserOptions, learning_rate: float) -> dict[str, Any]:
    """Load the DeepSpeed configuration of one trained model; only bucket sizes may stay "auto".

    path: a JSON file; empty for the shipped default. learning_rate: of this model, from the options.
    The result also holds --attn_implementation. Raises UserError, naming the file and the key, for what is
    unreadable, unknown, contradicts an option or is refused by DeepSpeed, and for 16 bits at stage 0.
    """
    source = Path(path) if path else CONFIG_FOLDER / ("zero0.json" if on_cpu() else "zero2.json")
    config = _read(source)
    stage = config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{source}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    _read_offload(config["zero_optimization"], source)
    _fill_precision(config, source)
    _fill_batch(config, source, options)
    _take_optimizer(config, source, options, learning_rate)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("steps_per_print", 1_000_000_000)
    _check_values(config, source)
    filled = {**config, "zero_optimization": {**config["zero_optimization"]}}
    fill_bucket_sizes(filled, hidden_size=1024)
    check_config(filled, source)
    check_attention(options.attn_implementation)
    if options.paged_adamw:
        check_paging(config)
    if options.attn_implementation != "auto":
        config["attn_implementation"] = options.attn_implementation
    return config


def frozen_config(trained: dict[str, Any], offload: bool = False) -> dict[str, Any] | None:
    """Derive the configuration of a frozen model: partitioned at stage 3, else None for a plain module.

    offload: keep each rank's partition in host memory.
    """
    if trained["zero_optimization"]["stage"] != 3:
        return None
    config = copy.deepcopy(trained)
    config["zero_optimization"].pop("offload_optimizer", None)
    if offload:
        config["zero_optimization"].setdefault("offload_param", {"device": "cpu", "pin_memory": True})
    return config


def unpartitioned(trained: dict[str, Any]) -> dict[str, Any]:
    """The same precision at stage 0, for a full copy of the model on one rank outside any engine."""
    return {**trained, "zero_optimization": {"stage": 0}}


def fill_bucket_sizes(config: dict[str, Any], hidden_size: int) -> None:
    """Replace "auto" bucket sizes by multiples of the hidden size, as Hugging Face does."""
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero = config["zero_optimization"]
    zero.update({key: size for key, size in sizes.items() if zero.get(key) == "auto"})


def _read(source: Path) -> dict[str, Any]:
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{source}: not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--zero_config {source}: {getattr(error, 'strerror', error)}") from None
    config = parse_json(text, source, unique=True)
    for key, value in config.items():
        if key in SECTIONS:
            _check_object(source, key, value)
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            raise UserError(
                f"{source}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return config


def _check_object(source: Path, key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{source}: {key} is {value!r}; it must be an object")


def offloads(config: dict[str, Any], section: str) -> bool:
    """Whether the section `offload_optimizer` or `offload_param` names a device; {} and "none" are off."""
    device = (config["zero_optimization"].get(section) or {}).get("device", "none")
    return device not in (None, "none")


def _read_offload(zero: dict[str, Any], source: Path) -> None:
    """Check the offload sections, and remove those that are off.

    For DeepSpeed `{"device": "none"}`, {} and null are off, and at stage 0 every section is.
    """
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name)
        device = section.get("device") if isinstance(section, dict) else section
        if device not in (None, "none", "cpu", "nvme") or not isinstance(section, dict | None):
            raise UserError(
                f'{source}: zero_optimization.{name} is {section!r}; it must be {{"device": "cpu"}}, with'
                " device one of none, cpu, nvme"
            )
        if device == "nvme" and not isinstance(section.get("nvme_path"), str):
            raise UserError(f"{source}: zero_optimization.{name} needs nvme_path, a folder on the NVMe disk")
        if not offloads({"zero_optimization": zero}, name) or zero["stage"] == 0:
            zero.pop(name, None)


def _fill_precision(config: dict[str, Any], source: Path) -> None:
    stage = config["zero_optimization"]["stage"]
    for name in ("bf16", "fp16"):
        section = config.get(name, {})
        if section.get("enabled") == "auto":
            section["enabled"] = name == "bf16" and stage > 0 and not on_cpu() and _has_bf16()
    enabled = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")]
    if enabled == ["bf16"]:
        config["bf16"].setdefault("check_grad_overflow", True)  # skip non-finite updates
    if stage == 0 and enabled:
        raise UserError(
            f"{source}: {enabled[0]} needs ZeRO stage 1 or higher; DeepSpeed's Adam is wrong at stage 0"
        )


def _has_bf16() -> bool:
    """Whether the GPU computes in bf16; older ones only emulate it, slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _fill_batch(config: dict[str, Any], source: Path, options: OptimiserOptions) -> None:
    ranks, name, size = data_ranks(), "--micro_batch_size", "auto"
    if options.global_batch_size % ranks:
        raise UserError(
            f"--global_batch_size {options.global_batch_size} is not a multiple of the {ranks} ranks"
            f"{' / --sequence_parallel' * (ranks < world_size())}; change one of the two"
        )
    if options.micro_batch_tokens:
        name, steps = "the size with --micro_batch_tokens", "auto"
    else:
        size = rows_per_micro_batch(options)
        steps = options.global_batch_size // (size * ranks)
    owned = {
        "train_batch_size": ("--global_batch_size", options.global_batch_size),
        "train_micro_batch_size_per_gpu": (name, size),
        "gradient_accumulation_steps": (f"--global_batch_size / {name} / ranks", steps),
        "gradient_clipping": ("--max_grad_norm", options.max_grad_norm),
    }
    for key, (name, value) in owned.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f'{source}: {key} is {config[key]} but {name} is {value}; write "auto" or the same value'
            )
        config[key] = value
    # Triptych sets the accumulation boundary, so that token means over uneven micro-batches are exact.
    config["gradient_accumulation_steps"] = 1
    if options.micro_batch_tokens:
        config["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed needs a number, and does not use it
    config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * world_size()


def _take_optimizer(
    config: dict[str, Any], source: Path, options: OptimiserOptions, learning_rate: float
) -> None:
    optimizer = config.pop("optimizer", {})
    scheduler = config.pop("scheduler", {})
    for name, section in (("optimizer", optimizer), ("scheduler", scheduler)):
        _check_object(source, f"{name}.params", section.get("params", {}))
    if optimizer and optimizer.get("type") not in ("Adam", "AdamW"):
        raise UserError(f"{source}: optimizer.type is {optimizer.get('type')!r}; only AdamW is supported")
    owned = {
        "lr": learning_rate,
        "betas": [options.adam_beta1, options.adam_beta2],
        "eps": options.adam_epsilon,
        "weight_decay": options.weight_decay,
    }
    for key, value in optimizer.get("params", {}).items():
        if key in owned and value not in ("auto", owned[key]):
            raise UserError(f"{source}: optimizer.params.{key} is {value} but the options give {owned[key]}")
    if scheduler and scheduler.get("type") not in SCHEDULERS:
        raise UserError(
            f"{source}: scheduler.type is {scheduler.get('type')!r}; allowed: {', '.join(SCHEDULERS)}"
        )
    if any(value != "auto" for value in scheduler.get("params", {}).values()):
        raise UserError(f"{source}: scheduler is set by --lr_scheduler_type and --warmup_ratio; remove it")


def _check_values(config: dict[str, Any], source: Path, path: str = "") -> None:
    buckets = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    if path.count(".") > DEEPEST:
        raise UserError(f"{source}: objects or lists are nested too deep")
    for key, value in config.items():
        if isinstance(value, dict):
            _check_values(value, source, f"{path}{key}.")
        elif value == "auto" and key not in buckets:
            raise UserError(f'{source}: {path}{key} cannot be "auto"; give a value or remove it')
        elif isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise UserError(f"{source}: {path}{key} is {shown(value)}; it must be at most {LARGEST:g}")

"""LoRA adapters, through `peft`."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.model.loading import load_config
from common.model.nf4 import NF4Linear, check_bitsandbytes, linear_layers, quantise
from common.runtime.distributed import log
from common.runtime.option_checks import without_needed
from common.runtime.options import LoraOptions, UserError, reason

# Adapters usually need 10 to 100 times the learning rate of full weights. A rate below this multiple of the
# default, which is for full weights, gets a warning.
LOW_RATE = 5
# Options without effect, each unless the other one is set.
NEEDS = {
    "lora_alpha": "lora_rank", "lora_target_modules": "lora_rank", "double_quantisation": "load_in_4bit",
}  # fmt: skip


def check_adapters(path: str, options: LoraOptions, *zeros: dict[str, Any]) -> None:
    """`check_4bit` and `check_targets`, and a warning for each option without effect and each learning rate
    that suits full weights rather than adapters. zeros: DeepSpeed configurations of the trained models.
    """
    for message in without_needed(options, NEEDS):
        log(f"warning: {message}")
    check_4bit(options, *(zero["zero_optimization"]["stage"] for zero in zeros))
    if options.load_in_4bit:
        check_bitsandbytes("load_in_4bit")
    check_targets(path, options)
    rates = [field for field in dataclasses.fields(options) if field.name.endswith("learning_rate")]
    if not getattr(options, "has_critic", True):
        rates = [field for field in rates if not field.name.startswith("critic")]
    for field in rates:
        rate = getattr(options, field.name)
        if options.lora_rank and rate < LOW_RATE * field.default:
            log(
                f"warning: --{field.name} {rate:g} is low for adapters; usual with --lora_rank is 10 to 100"
                f" times the default: {10 * field.default:g} to {100 * field.default:g}"
            )


def check_4bit(options: LoraOptions, *stages: int) -> None:
    """Raise UserError for 4-bit weights without adapters, or at ZeRO stage 3."""
    if not options.load_in_4bit:
        return
    if not options.lora_rank:
        raise UserError("--load_in_4bit: needs --lora_rank above 0; 4-bit weights are not trained")
    if 3 in stages:
        raise UserError(
            "--load_in_4bit: ZeRO stage 3 does not partition 4-bit weights; allowed: stage 0, 1 or 2"
        )


def check_targets(path: str, options: LoraOptions) -> None:
    """Raise UserError when --lora_target_modules matches no module, --lora_rank is above the size of all, or
    no layer can be in 4 bits.

    Loads no weights.
    """
    if not options.lora_rank:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(path), trust_remote_code=False)
    linear = {
        name: min(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or _is_conv1d(module)
    }
    if options.load_in_4bit and not linear_layers(model):
        raise UserError(f"--load_in_4bit: {path}: {type(model).__name__} has no layers of the class Linear")
    if options.lora_rank > (largest := max(linear.values(), default=0)):
        raise UserError(
            f"--lora_rank {options.lora_rank}: above the size of all layers of {path};"
            f" allowed: 0 to {largest}"
        )
    for target in [] if options.lora_target_modules == ["all-linear"] else options.lora_target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(
                f"--lora_target_modules {target}: no such module in {path}; allowed: {' '.join(known)}"
            )


def add_adapters(model: PreTrainedModel, options: LoraOptions, seed: int) -> nn.Module:
    """Freeze the model and add adapters. A scalar head stays trainable; peft saves it with the adapter.

    With --load_in_4bit the frozen layers are quantised first.
    """
    if not options.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    if options.load_in_4bit:
        quantise(model, options.double_quantisation)
    torch.manual_seed(seed)  # the same initial adapters on every rank
    is_scalar = hasattr(model, "score")
    targets = options.lora_target_modules
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="SEQ_CLS" if is_scalar else "CAUSAL_LM",
        modules_to_save=["score"] if is_scalar else None,
        exclude_modules=_outside_text(model),
    )
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {' '.join(targets)}: {reason(error)}") from error


def is_adapted(module: nn.Module) -> bool:
    """Whether the model carries peft adapters."""
    return hasattr(module, "disable_adapter")


@contextlib.contextmanager
def merged_adapters(module: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Context manager: layers use copies of their weights that include the adapters, for fast sampling.

    The weights themselves stay as they are. Merged in place and subtracted again, 16-bit weights would drift.
    """
    if not enabled or not is_adapted(module):
        yield
        return
    layers, stacks = ([m for m in module.modules() if test(m)] for test in (is_mergeable, _is_stack))
    # Of a 4-bit layer, its adapter.
    owners = {(_base_layer(layer), "weight"): layer for layer in reversed(layers)}
    owners |= {(stack.get_base_layer(), stack.parameter_name): stack for stack in stacks}
    originals = {(base, name): getattr(base, name) for base, name in owners}
    try:
        for (base, name), layer in owners.items():  # not their data: a tied embedding has no adapter
            merged = merged_stack(layer) if _is_stack(layer) else merged_weight(layer)
            setattr(base, name, nn.Parameter(merged, requires_grad=False))
        with module.disable_adapter():
            yield
    finally:
        for (base, name), original in originals.items():
            setattr(base, name, original)


@torch.no_grad()
def merged_weight(layer: nn.Module) -> Tensor:
    """W + alpha / rank B A, rounded once. Source: Hu et al. 2021, section 4.1.

    layer: with an adapter, or in 4 bits, or both. W in 4 bits is dequantised in fp32.
    """
    base = _base_layer(layer)
    is_4bit = isinstance(base, NF4Linear)
    dtype = base.dtype if is_4bit else base.weight.dtype
    merged = base.dequantised(torch.float32) if is_4bit else base.weight.float()
    for name in getattr(layer, "active_adapters", []):
        a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
        update = layer.scaling[name] * b @ a
        merged = merged + (update.T if layer.fan_in_fan_out else update)
    return merged.to(dtype)


@torch.no_grad()
def merged_stack(layer: nn.Module) -> Tensor:
    """W + alpha / rank B A, of a router or of the stacked weights of a layer's experts."""
    weight = layer.get_param()
    updates = [layer.get_delta_weight(name) for name in layer.active_adapters]
    return sum((update.float() for update in updates), weight.float()).to(weight.dtype)


def merge_4bit(adapted: nn.Module, trained: nn.Module) -> None:
    """Merge the layers of `adapted` that have 4 bits in `trained`, as `merged_weight` does: W of `trained`,
    with the adapter of `adapted`. Other layers stay as they are.

    `adapted` has the model before it was quantised; merged by peft, 4-bit weights would get 4 bits again.
    """
    for name, packed in trained.named_modules():
        if isinstance(packed, NF4Linear):
            layer, owner = adapted.get_submodule(name), name.removesuffix(".base_layer")
            layer.weight.data = packed.dequantised(torch.float32).to(layer.weight.device)
            layer.weight.data = merged_weight(adapted.get_submodule(owner)).to(packed.dtype)
            adapted.set_submodule(owner, layer)


def is_mergeable(layer: nn.Module) -> bool:
    """Whether `merged_weight` has a matrix for the layer: with an adapter, or in 4 bits."""
    from peft.tuners.lora import Linear

    return isinstance(layer, Linear | NF4Linear)


def _is_stack(layer: nn.Module) -> bool:
    """Whether the layer is peft's adapter of a parameter that is in no linear layer, as experts have."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def _base_layer(layer: nn.Module) -> nn.Module:
    return getattr(layer, "base_layer", layer)


def _outside_text(model: PreTrainedModel) -> str | None:
    """Regular expression for the modules of a multimodal model outside the text path, such as vision."""
    if model.config.get_text_config() is model.config:
        return None
    decoder, parts = model.get_decoder(), model.base_model.named_children()
    return rf".*\b({'|'.join(name for name, part in parts if part is not decoder)})\b.*"


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's transposed linear layer

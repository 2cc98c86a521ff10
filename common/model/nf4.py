"""Linear layers in 4 bits (NF4), through bitsandbytes: the frozen weights under adapters (QLoRA)."""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.runtime.distributed import device, log
from common.runtime.options import UserError

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # no advice about kernels for sampling on a CPU

BLOCK = 64  # weights that share a scale
BLOCK_OF_SCALES = 256  # scales that share one, with double quantisation: fixed in bitsandbytes
PACKAGE = "common/model/requirements-qlora.txt"


class NF4Linear(nn.Linear):
    """y = x W^T + b with frozen W in NF4. Source: Dettmers et al. 2023 (QLoRA), equations 5 and 6.

    W is dequantised for each product, and again for its gradient, in the precision of x. While responses are
    sampled, `weight` may be a plain matrix instead.
    """

    def __init__(self, linear: nn.Linear, is_double: bool) -> None:
        """Quantise a linear layer, on the device. is_double: quantise the scales of the blocks too."""
        from bitsandbytes.functional import quantize_4bit

        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        weight = linear.weight.detach().to(device()).contiguous()
        packed, state = quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=is_double, quant_type="nf4"
        )
        self.weight = nn.Parameter(packed, requires_grad=False)  # (weights / 2, 1) uint8: two per byte
        parts = {"scales": state.absmax}  # fp32, or uint8 with double quantisation
        if is_double:
            second = state.state2
            parts |= {"scales_of_scales": second.absmax, "code": second.code, "offset": state.offset}
        for name, tensor in parts.items():  # buffers move with the model; checkpoints leave them out
            bits = tensor if tensor.dtype == torch.uint8 else tensor.view(torch.int32)  # no cast rounds them
            self.register_buffer(name, bits, persistent=False)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), computed in fp32 and rounded once."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        fp32 = {name: b.view(torch.float32) for name, b in self.named_buffers() if b.dtype == torch.int32}
        double = {}
        if "offset" in fp32:
            second = QuantState(
                fp32["scales_of_scales"], code=fp32["code"], blocksize=BLOCK_OF_SCALES, dtype=torch.float32
            )
            double = {"offset": fp32["offset"], "state2": second}
        scales, shape = fp32.get("scales", self.scales), torch.Size((self.out_features, self.in_features))
        state = QuantState(scales, shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype, **double)
        return dequantize_4bit(self.weight, state)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_floating_point():
            return super().forward(x)
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """x W^T + b, whose graph holds neither x nor the dequantised W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantised(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


def quantise(model: PreTrainedModel, is_double: bool) -> None:
    """Replace the layers of `linear_layers` by NF4 ones, each before the next, to hold few copies."""
    names = [*linear_layers(model)]
    for name in names:
        owner, _, leaf = name.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, leaf, NF4Linear(getattr(parent, leaf), is_double))
    log(f"{len(names)} linear layers are in 4 bits; the model has {nbytes(model) / 2**30:.3g} GiB of weights")


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers by name, but for the output head or scalar head."""
    heads = model.get_output_embeddings(), getattr(model, "score", None)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(module is head for head in heads)
    }


def nbytes(model: nn.Module) -> int:
    """Bytes of weights, and of the scales of those in 4 bits."""
    scales = [buffer for m in model.modules() if isinstance(m, NF4Linear) for buffer in m.buffers()]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *scales))


def check_bitsandbytes(option: str) -> None:
    """Raise UserError, naming the option, where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"--{option}: bitsandbytes is not installed: .venv/bin/pip install -r requirements.txt"
            f" -r {PACKAGE}"
        )

"""Tensors that claim to be on a GPU, to notice on any machine when a CPU tensor meets a GPU tensor.

Their numbers are computed on the CPU, so code that reads them runs as well. Autograd needs a build for CUDA.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from common.runtime import distributed

GPU = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
JOINING = (torch.ops.aten.cat, torch.ops.aten.stack)
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class GPUTensor(Tensor):
    """A tensor with the device cuda:0; `numbers` has the numbers.

    For torch's C++ code it is on the CPU, since a build without CUDA stops at another device.
    """

    device, is_cuda, is_cpu = GPU, True, False

    @staticmethod
    def __new__(cls, real: Tensor) -> "GPUTensor":
        return Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device="cpu",
        )  # fmt: skip

    def __init__(self, real: Tensor) -> None:
        self.numbers = real

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def numpy(self, **_: Any) -> None:
        raise TypeError("a GPU tensor has no NumPy array")

    def cpu(self, **_: Any) -> Tensor:
        return self.numbers.clone()

    def to(self, *arguments: Any, **named: Any) -> Tensor:
        copy = named.pop("copy", False)
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **named)
        numbers = self.numbers.to(dtype=dtype, copy=copy or (device or GPU).type == "cpu")
        return numbers if device and device.type == "cpu" else GPUTensor(numbers)

    def new_tensor(self, data: Any, **named: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": GPU, **named})

    @classmethod
    def __torch_function__(cls, func: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        if func is Tensor.to and len(arguments) == 2 and isinstance(arguments[1], GPUTensor):
            return arguments[0].to(device=GPU, dtype=arguments[1].dtype)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*arguments, **named or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        return _run(func, arguments, named or {})


class _Dispatch(TorchDispatchMode):
    """Also sees operations that create tensors."""

    def __torch_dispatch__(self, func: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        return _run(func, arguments, named or {})


def _run(func: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    tensors = [one for one in tree_iter((arguments, named)) if isinstance(one, Tensor)]
    is_on_gpu = any(isinstance(one, GPUTensor) for one in tensors)
    if is_on_gpu:
        _check(func, arguments, tensors)
    if named.get("device") is not None:
        # Conversions by torch's own C++ code name the device that it takes for that of the tensor.
        is_on_gpu &= func.overloadpacket is torch.ops.aten._to_copy
        is_on_gpu |= torch.device(named["device"]).type == "cuda"
        named = named | {"device": torch.device("cpu")}
    wrappers = {id(one.numbers): one for one in tensors if isinstance(one, GPUTensor)}
    if func is torch.ops.aten.mm.dtype:  # products of 16-bit factors in fp32, which CPUs do not have
        func, arguments = torch.ops.aten.mm.default, [one.to(arguments[2]) for one in arguments[:2]]
    result = func(*tree_map(_real, arguments), **tree_map(_real, named))

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_on_gpu:
            return value
        return wrappers[id(value)] if id(value) in wrappers else GPUTensor(value)

    return tree_map(wrapped, result)


def _real(value: Any) -> Any:
    return value.numbers if isinstance(value, GPUTensor) else value


def _check(func: Any, arguments: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raise RuntimeError where CUDA would. Indices of a GPU tensor, and single numbers, may be on the CPU."""
    packet, first = func.overloadpacket, tensors[0]
    if packet in COPIES:
        return
    if packet in INDEXING and isinstance(first, GPUTensor):
        tensors = [one for one in (first, *arguments[2:]) if isinstance(one, Tensor)]
    changed = first if packet.__name__.endswith("_") else None
    for one in tensors:
        is_number = one.dim() == 0 and one is not changed and packet not in JOINING
        if not isinstance(one, GPUTensor) and not is_number:
            raise RuntimeError(f"{func}: a CPU tensor of shape {tuple(one.shape)} meets a GPU tensor")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, `device()` is a GPU, and tensors created on it are GPUTensors."""
    users = [one for one in sys.modules.values() if getattr(one, "device", None) is distributed.device]
    with pytest.MonkeyPatch.context() as patch, _Dispatch(), torch.no_grad():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        for module in users:
            patch.setattr(module, "device", lambda: GPU)
        torch._C._set_only_lift_cpu_tensors(True)  # as FakeTensorMode does
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def on_gpu(model: nn.Module) -> nn.Module:
    """Move the weights; inside `pretended_gpu`."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(GPUTensor(weight.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = GPUTensor(buffer)
    return model

"""Checks of the machine: libraries and speeds."""

import subprocess

import torch
from deepspeed.accelerator import get_accelerator

from tests.gpu.setting import GIB, Outcome, Setting

LEAST_COPIED = 12e9  # bytes per second, to a GPU from pinned memory


def environment(setting: Setting) -> Outcome:
    """Driver, CUDA, accelerator, bf16 and NCCL work together."""
    name = get_accelerator().device_name()
    figure = f"torch {torch.__version__}, accelerator {name}"
    if setting.is_cpu:
        return Outcome(name == "cpu", f"{figure}; driver, bf16 and NCCL need a GPU")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    figure += f", {torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}, NCCL {nccl}"
    return Outcome(name == "cuda" and has_bf16, f"{figure}, bf16 {'yes' if has_bf16 else 'NO'}")


def speeds(setting: Setting) -> Outcome:
    """Matrix products, memory, and copies from the host."""
    flops = multiply(setting, 256 if setting.is_cpu else 8192)
    memory = copy(setting, 2**20 if setting.is_cpu else 4 * GIB)
    host = copy(setting, 2**20 if setting.is_cpu else GIB, is_from_host=True)
    figure = (
        f"{flops / 1e12:.3g} TFLOP/s, memory {memory / 1e9:.3g} GB/s, from the host {host / 1e9:.3g} GB/s"
    )
    return Outcome(setting.is_cpu or host >= LEAST_COPIED, figure, {"host_bandwidth": host})


def multiply(setting: Setting, size: int) -> float:
    """FLOP/s of products of square matrices in bf16."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=setting.device) for _ in range(2))
    return 2 * size**3 / min(setting.seconds(lambda: a @ b) for _ in range(10))


def copy(setting: Setting, size: int, is_from_host: bool = False) -> float:
    """Bytes per second of copies on the device, read and written; or of copies from pinned memory."""
    target = torch.zeros(size, dtype=torch.uint8, device=setting.device)
    source = torch.zeros_like(target)
    if is_from_host:
        source = source.cpu() if setting.is_cpu else source.cpu().pin_memory()
    seconds = min(setting.seconds(lambda: target.copy_(source)) for _ in range(5))
    return size * (1 if is_from_host else 2) / seconds

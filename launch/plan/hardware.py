"""Speeds of GPUs, their links and their hosts: one table with sources; measured speeds can replace them.

Peaks are those of data sheets, of GPUs with NVLink (SXM). Shares of them that programs reach are assumptions
where no source is named. Nothing was measured for this table.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common.runtime.options import UserError

GpuName = Literal["a100_40gb", "a100_80gb", "h100_80gb", "h200"]
LinkName = Literal["hdr200", "ndr400", "efa400", "ethernet100"]


class Gpu(NamedTuple):
    """Memory as the driver reports it, peaks of the data sheet, and shares of them that training reaches."""

    gib: float
    flops: float  # dense, bf16
    fp32_flops: float
    bandwidth: float  # of its memory, bytes/s
    host_bandwidth: float  # PCIe x16, one direction, bytes/s
    node_bandwidth: float  # collectives among 8 GPUs of a node: bus bandwidth of nccl-tests, bytes/s
    host_memory: float  # host memory of a node of 8 GPUs, bytes/s
    matmul_share: float  # of `flops`, in training


# Data sheets of A100 (2021), H100 and H200 (2024). Host memory: 16 channels of DDR4-3200 or DDR5-4800.
# nccl-tests on 8 A100: 230 to 250 GB/s, 0.78 of NVLink's 300 (docs.alayanew.com/en/docs/tech-blog/
# 2026-05-06-nccl-tests). The same share on H100: their 460 to 480 GB/s are of reductions in the switch.
# Shares of peak FLOP/s: A100, Narayanan et al. 2021 (Megatron-LM), table 1: 0.43 to 0.52; H100, Llama 3 herd
# of models (2024), table 4: 0.38 to 0.43.
A100_80GB = Gpu(79.2, 312e12, 19.5e12, 2.039e12, 31.5e9, 235e9, 409.6e9, 0.45)
H100_80GB = Gpu(79.2, 989e12, 67e12, 3.35e12, 63e9, 350e9, 614.4e9, 0.40)
GPUS: dict[GpuName, Gpu] = {
    "a100_40gb": A100_80GB._replace(gib=39.4, bandwidth=1.555e12),
    "a100_80gb": A100_80GB,
    "h100_80gb": H100_80GB,
    "h200": H100_80GB._replace(gib=139.8, bandwidth=4.8e12),
}


class Link(NamedTuple):
    """Peak of a network in one direction, bytes/s: an adapter per GPU, or those of a node together."""

    per_gpu: float = 0.0
    per_node: float = 0.0


LINKS: dict[LinkName, Link] = {
    "hdr200": Link(per_gpu=25e9),  # 200 Gb/s InfiniBand per GPU
    "ndr400": Link(per_gpu=50e9),  # 400 Gb/s InfiniBand per GPU
    "efa400": Link(per_node=50e9),  # 4 x 100 Gb/s per node: AWS p4d
    "ethernet100": Link(per_node=12.5e9),  # 100 Gb/s per node
}

MEMORY_SHARE = 0.78  # reading weights; gives the 107 tokens/s of Llama-7B in the blog below
CACHE_SHARE = 0.5  # reading keys and values of one query per row, behind a mask
FP32_SHARE = 0.6  # matrix products without tensor cores
HOST_SHARE = 0.8  # copies from and to pinned memory
# nccl-tests reach 0.9 with large messages (github.com/NVIDIA/nccl-tests, issue 100); ZeRO's are smaller.
NETWORK_SHARE = 0.75
# 25.5 tokens/s of Llama-7B without a compiler on an A100, bound by the host (pytorch.org/blog/
# accelerating-generative-ai-2), over the 1,319 kernels of a decoding step here.
LAUNCH_SECONDS = 30e-6
KERNEL_SECONDS = 3e-6  # least time of a small kernel on the GPU
HOST_MEMORY_SHARE = 0.6
CPU_ADAM_BYTES = 30  # of a parameter: gradient, weight, two moments read, and all but the gradient written
GPUS_PER_HOST = 8  # to which `host_memory` belongs


@dataclass(frozen=True)
class Hardware:
    """What one GPU and its links reach: FLOP/s, bytes/s and seconds. A file of measured speeds has these
    names.
    """

    matmul_flops: float  # in 16 bits
    fp32_flops: float
    memory_bandwidth: float  # weights in decoding, optimiser states
    cache_bandwidth: float  # keys and values in decoding
    launch_seconds: float  # of a kernel launched from Python
    kernel_seconds: float  # of a small kernel
    node_bandwidth: float  # collectives within a node, per GPU
    network_bandwidth: float  # collectives between nodes, per node
    host_bandwidth: float  # copies between pinned host memory and the GPU
    cpu_adam_rate: float  # parameters per second and rank by DeepSpeed's AdamW on the CPU


def table_of(gpu: GpuName, link: LinkName, gpus_per_node: int) -> Hardware:
    """The speeds of the table."""
    card, network = GPUS[gpu], LINKS[link]
    return Hardware(
        matmul_flops=card.matmul_share * card.flops,
        fp32_flops=FP32_SHARE * card.fp32_flops,
        memory_bandwidth=MEMORY_SHARE * card.bandwidth,
        cache_bandwidth=CACHE_SHARE * card.bandwidth,
        launch_seconds=LAUNCH_SECONDS,
        kernel_seconds=KERNEL_SECONDS,
        node_bandwidth=card.node_bandwidth,
        network_bandwidth=NETWORK_SHARE * (network.per_gpu * gpus_per_node + network.per_node),
        host_bandwidth=HOST_SHARE * card.host_bandwidth,
        cpu_adam_rate=HOST_MEMORY_SHARE * card.host_memory / GPUS_PER_HOST / CPU_ADAM_BYTES,
    )


def with_measured(hardware: Hardware, path: str) -> Hardware:
    """The speeds with those of a JSON object in place of the table's. Raises UserError for other contents."""
    try:
        measured: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "no JSON"
        raise UserError(f"--measured_speeds {path}: {problem}") from None
    names = [field.name for field in dataclasses.fields(Hardware)]
    if not isinstance(measured, dict):
        raise UserError(f"--measured_speeds {path}: must be an object with some of {' '.join(names)}")
    for name, value in measured.items():
        if name not in names:
            raise UserError(f"--measured_speeds {path}: unknown speed {name!r}; allowed: {' '.join(names)}")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"--measured_speeds {path}: {name} is {value!r}; it must be a number above 0")
    return dataclasses.replace(hardware, **measured)

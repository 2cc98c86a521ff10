"""Names of vLLM that its documentation does not promise, and what its engine leaves behind in the process.

Read from version 0.32.0.
"""

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from common.runtime.distributed import any_kernels, device, on_cpu

# In the ranks' own processes and from all of their threads, without messages home.
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
# Sizes of attention heads in its CPU build: `CPUAttentionBackend.get_supported_head_sizes`.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def start_engine(**settings: Any) -> Any:
    """A `vllm.LLM` in this process; every rank must call it."""
    os.environ |= VARIABLES
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    set_num_threads = torch.set_num_threads
    with own_state():
        from vllm import LLM

        if on_cpu():
            _adapt_cpu_build()
        engine = LLM(**settings)
    torch.set_num_threads = set_num_threads  # the CPU build puts a function without effect here
    # Its shutdown would destroy the process group of the ranks; the end of the process frees everything.
    engine.llm_engine.engine_core._finalizer.detach()
    return engine


def _adapt_cpu_build() -> None:
    from vllm import _custom_ops
    from vllm.distributed.device_communicators import cpu_communicator

    # oneDNN's packed copies of weights do not all follow new weights: a tied output head stays old.
    _custom_ops._supports_onednn = False
    # Its shared memory has the same name in all runs on a machine, and outlives a killed run. With a name per
    # rank the ranks use the process group instead.
    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(lambda group: str(group.rank))


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Inside, random numbers and kernels are vLLM's, which seeds all generators and draws from them."""
    states = random.getstate(), np.random.get_state()
    try:
        with any_kernels(), torch.random.fork_rng(devices=[] if on_cpu() else [device()]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])

"""Resume on another number of ranks; whole runs are in tests/end_to_end/test_resume.py."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.training.resume import own_step_counters


def test_step_counters_are_on_the_device_of_their_weights() -> None:
    """DeepSpeed leaves one shared counter on the CPU, which fused AdamW refuses on a GPU."""
    with FakeTensorMode():
        weights = [torch.empty(2, device="cuda"), torch.empty(3, device="cuda"), torch.empty(2)]
        optimizer = torch.optim.AdamW(weights)
        shared = torch.tensor(7.0)
        for weight in weights:
            optimizer.state[weight] = {"step": shared, "exp_avg": torch.empty_like(weight)}
        own_step_counters(optimizer)
        counters = [optimizer.state[weight]["step"] for weight in weights]
        assert [counter.device.type for counter in counters] == ["cuda", "cuda", "cpu"]
        assert all(counter is not shared for counter in counters) and len({*map(id, counters)}) == 3

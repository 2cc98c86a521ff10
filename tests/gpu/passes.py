"""Checks of passes: attention, launches, the output head in chunks, merged adapters."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from common.model.forward import label_pass
from common.model.head import Targets
from common.model.linear_head import wide_logits
from common.model.lora import add_adapters, merged_adapters
from common.runtime.options import LoraOptions
from tests.bench.head import LOSSES, fake_peak, loss_part, make_inputs, targets_of
from tests.gpu.sampling import BESIDES, OF_LAYER, sample
from tests.gpu.setting import GIB, Outcome, Setting

BESIDES_GRAPH = 80  # draws and copies around a graph
ATTENTION = "aten::_scaled_dot_product_"
HEAD_SHARE = 0.15  # most memory of the head in chunks, relative to all logits at once
LARGEST_ERROR = 0.02  # of gradients in bf16, relative
LARGEST_ROUNDING = 1e-3  # of fp32 logits from factors in bf16
LARGEST_MERGE_ERROR = 0.1  # of logits in bf16, relative to the adapters' effect


def attention(setting: Setting) -> Outcome:
    """Training and decoding use fused attention, and a step launches as few kernels as it should."""
    model = setting.model("1B", layers=4)
    training = profiled(setting, lambda: train(setting, model))
    kinds = {name.removeprefix(ATTENTION) for name in training if name.startswith(ATTENTION)}
    figures = [f"training: {', '.join(sorted(kinds))}"]
    passed = bool(kinds) and not any("math" in kind for kind in kinds)
    for name, is_compiled in (("eager", False), ("graphs", True)):
        sample(setting, model, 24, is_compiled)
        few, many = (
            profiled(setting, lambda n=n, c=is_compiled: sample(setting, model, n, c)) for n in (8, 24)
        )
        kinds = {one.removeprefix(ATTENTION) for one in many if one.startswith(ATTENTION)}
        passed &= not any("math" in kind for kind in kinds)
        launches = (launched(many) - launched(few)) / 16
        most = BESIDES_GRAPH if is_compiled else 1.1 * (OF_LAYER * model.config.num_hidden_layers + BESIDES)
        passed &= launches <= most
        figures.append(f"{name}: {', '.join(sorted(kinds))}, {launches:.0f} launches per token")
    return Outcome(passed, "; ".join(figures) + "; no launches: needs CUDA" * setting.is_cpu)


def train(setting: Setting, model: torch.nn.Module) -> None:
    """Forward and backward pass over rows without padding."""
    width = 32 if setting.is_cpu else 1024
    ids = torch.arange(3, 3 + width, device=setting.device).expand(2, -1)
    rows, columns = torch.ones_like(ids[:, 1:]).nonzero(as_tuple=True)
    label_pass(model.train(), ids, (rows, columns), Targets(ids[:, 1:].flatten())).logprobs.sum().backward()
    model.zero_grad()
    model.eval()


def profiled(setting: Setting, work: Callable[[], Any]) -> Counter[str]:
    """Names of operations and calls of the driver, and how often they occur."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not setting.is_cpu)
    with profile(activities=activities) as profiler:
        work()
        setting.synchronise()
    return Counter({event.key: event.count for event in profiler.key_averages()})


def launched(events: Counter[str]) -> int:
    return sum(n for name, n in events.items() if name.startswith(("cudaLaunchKernel", "cuLaunchKernel")))


def head(setting: Setting) -> Outcome:
    """Memory of the head in chunks beside all logits at once, on the CPU of fake tensors; fp32 logits."""
    tokens, hidden = (450, 16) if setting.is_cpu else (8192, 4096)
    peaks, gradients = [], []
    for is_chunked in (False, True):
        torch.manual_seed(0)
        with setting.device:
            weight, states = make_inputs(tokens, hidden, torch.bfloat16)
            loss_part(weight, states, targets_of(LOSSES[-1], tokens), is_chunked)
        if setting.is_cpu:
            peaks.append(fake_peak(LOSSES[-1], 8192, 4096, torch.bfloat16, is_chunked))
        else:
            peaks.append((torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / GIB)
            torch.cuda.reset_peak_memory_stats()
        gradients.append(states.grad.float())
        linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        linear.weight = weight
        exact = states[:64].double() @ weight.double().T
        rounding = (wide_logits(linear, states[:64]) - exact).abs().max().item()
        del weight, states, linear, exact
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    figure = f"{peaks[0]:.2f} -> {peaks[1]:.2f} GiB, gradients differ by {error:.2g} of their size"
    figure += f", logits {rounding:.2g} from those of fp64"
    passed = peaks[1] <= HEAD_SHARE * peaks[0] and error <= LARGEST_ERROR and rounding <= LARGEST_ROUNDING
    return Outcome(passed, figure)


@torch.no_grad()
def adapters(setting: Setting) -> Outcome:
    """Merged copies for sampling: logits of the adapters, weights as before, and memory given back."""
    model = add_adapters(setting.model("1B", layers=4), LoraOptions(lora_rank=16), seed=0).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.normal_(std=0.05)
    ids = torch.arange(3, 35, device=setting.device)[None]
    before = [parameter.clone() for parameter in model.parameters()]
    expected, held = model(ids).logits.float(), allocated(setting)
    with merged_adapters(model):
        merged, copies = model(ids).logits.float(), allocated(setting) - held
    with model.disable_adapter():
        effect = (model(ids).logits.float() - expected).std()
    error = ((merged - expected).std() / effect).item()
    is_same = all(map(torch.equal, before, model.parameters()))
    left = allocated(setting) - held
    figure = f"error {error:.2g} of the adapters' effect, weights {'the same' if is_same else 'CHANGED'}"
    figure += f", copies of {copies:.2f} GiB, {left:.2f} left" * (not setting.is_cpu)
    return Outcome(error <= LARGEST_MERGE_ERROR and is_same and left < max(copies / 10, 1e-9), figure)


def allocated(setting: Setting) -> float:
    """GiB of tensors on the GPU."""
    return 0.0 if setting.is_cpu else torch.cuda.memory_allocated() / GIB

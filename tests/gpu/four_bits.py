"""Checks of 4-bit weights and paged moments."""

import importlib.util

import torch

from common.model.lora import add_adapters, merged_adapters
from common.model.nf4 import nbytes
from common.runtime.options import LoraOptions
from tests.gpu.setting import Outcome, Setting, skipped

ADAPTERS = LoraOptions(lora_rank=16, load_in_4bit=True)
MOST_BYTES = 0.5  # of the model in bf16; embedding and head stay
LARGEST_MERGE_ERROR = 0.1  # of logits in bf16, relative to the adapters' effect
LARGEST_STEP_ERROR = 1e-5  # of weights after the steps
WEIGHTS = 2**20  # moments of 100,000 numbers and more are paged


def has_package() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def four_bits(setting: Setting) -> Outcome:
    """A base in 4 bits: its bytes, gradients of adapters, and merged copies for sampling."""
    if not has_package():
        return skipped("bitsandbytes is not installed")
    model = setting.model("1B", layers=4)
    full = nbytes(model)
    model = add_adapters(model, ADAPTERS, seed=0).to(setting.device, torch.bfloat16).eval()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    share = (nbytes(model) - sum(adapter.nbytes for adapter in adapters)) / full
    for adapter in adapters:
        adapter.data.normal_(std=0.05)
    ids = torch.arange(3, 35, device=setting.device)[None]
    model(ids, labels=ids).loss.backward()
    has_gradients = all(adapter.grad is not None and adapter.grad.isfinite().all() for adapter in adapters)
    with torch.no_grad():
        expected = model(ids).logits.float()
        with merged_adapters(model):
            merged = model(ids).logits.float()
        with model.disable_adapter():
            effect = (model(ids).logits.float() - expected).std()
    error = ((merged - expected).std() / effect).item()
    figure = f"{share:.2f} of the bytes, merged: error {error:.2g} of the adapters' effect"
    most = 1.0 if setting.is_cpu else MOST_BYTES
    return Outcome(bool(has_gradients) and share <= most and error <= LARGEST_MERGE_ERROR, figure)


def paging(setting: Setting) -> Outcome:
    """AdamW with paged moments takes the steps of torch's."""
    if not has_package():
        return skipped("bitsandbytes is not installed")
    from bitsandbytes.optim import PagedAdamW32bit

    torch.manual_seed(0)
    start = torch.randn(WEIGHTS, device=setting.device)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimisers = PagedAdamW32bit([ours], **settings), torch.optim.AdamW([theirs], fused=True, **settings)
    for _ in range(5):
        gradient = torch.randn_like(start)
        for parameter, optimiser in zip((ours, theirs), optimisers, strict=True):
            parameter.grad = gradient.clone()
            optimiser.step()
    error = (ours - theirs).abs().max().item()
    figure = f"weights differ by {error:.2g}"
    if setting.is_cpu:
        return Outcome(error <= LARGEST_STEP_ERROR, f"{figure}; pages need CUDA")
    is_paged = getattr(optimisers[0].state[ours]["state1"], "is_paged", False)
    return Outcome(
        error <= LARGEST_STEP_ERROR and is_paged, f"{figure}, moments are {'' if is_paged else 'NOT '}paged"
    )

"""The output head in chunks beside all logits at once: peak memory and time of the loss part.

    python tests/bench/head.py                # memory with fake tensors; then resident memory and CPU seconds
    python tests/bench/head.py --fake_only    # in a second

The loss part is the head, the log-probabilities of labels with the entropy as a metric, and the backward pass
to states and weights. It begins with states and ends with the gradients of both, which are not counted.
"""

import argparse
import multiprocessing
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.model.head import Targets, in_chunks, logprobs_and_entropy

VOCABULARY = 152_000
GIB = 2**30
RUNS = 3


def make_inputs(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.randn(VOCABULARY, hidden, dtype=dtype) * hidden**-0.5
    return weight.requires_grad_(), torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)


def loss_part(weight: Tensor, states: Tensor, is_chunked: bool) -> None:
    def head(chunk: Tensor) -> Tensor:
        return torch.nn.functional.linear(chunk, weight)

    targets = Targets(torch.arange(len(states)), temperature=0.9, entropy="value")
    if is_chunked:
        result = in_chunks(head, states, targets, VOCABULARY)
    else:
        result = logprobs_and_entropy(head(states), targets)
    result[0].mean().backward()


def fake_peak(tokens: int, hidden: int, dtype: torch.dtype, is_chunked: bool) -> float:
    """GiB. Unlike real ones, fake gradients are summed out of place, which adds one of the weights' size."""
    with FakeTensorMode():
        weight, states = make_inputs(tokens, hidden, dtype)
        tracker = MemTracker()
        tracker.track_external(weight, states)
        with tracker:
            loss_part(weight, states, is_chunked)
        total = tracker.get_tracker_snapshot("peak")[states.device]["Total"]
    return (total - (2 + is_chunked) * weight.nbytes - 2 * states.nbytes) / GIB


def measure(tokens: int, hidden: int, is_chunked: bool) -> tuple[float, float]:
    """CPU seconds, and GiB of resident memory."""
    torch.set_num_threads(1)
    weight, states = make_inputs(tokens, hidden, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF)
    loss_part(weight, states, is_chunked)
    after = resource.getrusage(resource.RUSAGE_SELF)
    grown = (after.ru_maxrss - before.ru_maxrss) * 1024 - weight.nbytes - states.nbytes
    return after.ru_utime - before.ru_utime, grown / GIB


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fake_only", action="store_true")
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (4096, 8192, 16384):
            plain, chunked = (fake_peak(tokens, 4096, dtype, way) for way in (False, True))
            print(f"{dtype}, {tokens} tokens: {plain:.2f} -> {chunked:.2f} GiB, {chunked / plain:.3f}")
    if parser.parse_args().fake_only:
        return
    for tokens, hidden in ((4096, 128), (1024, 1024)):
        ways = [False, True] * RUNS
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            results = pool.starmap(measure, [(tokens, hidden, way) for way in ways], chunksize=1)
        print(f"{tokens} tokens, hidden size {hidden}: (CPU seconds, GiB)")
        print(f"  all logits at once {min(results[::2])}, chunks {min(results[1::2])}", flush=True)


if __name__ == "__main__":
    main()

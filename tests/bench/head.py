"""The output head in chunks beside all logits at once: peak memory and time of the loss part.

    python tests/bench/head.py                # memory with fake tensors; then resident memory and CPU seconds
    python tests/bench/head.py --fake_only    # in a second

The loss part is the head, the loss, and the backward pass to states and weights. It begins with states and
ends with the gradients of both, which are not counted. Losses: cross-entropy, as of step 1, and the
log-probabilities of labels with the entropy as a metric, as of step 3.
"""

import argparse
import itertools
import multiprocessing
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.model.head import Targets, in_chunks, logprobs_and_entropy

VOCABULARY = 152_000
GIB = 2**30
RUNS = 3
LOSSES = ("cross-entropy", "log-probabilities and entropy")


def make_inputs(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = nn.Parameter(torch.randn(VOCABULARY, hidden, dtype=dtype) * hidden**-0.5)
    return weight, torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)


def loss_part(weight: Tensor, states: Tensor, targets: Targets, is_chunked: bool) -> None:
    if is_chunked:
        head = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        head.weight = weight
        result = in_chunks(head, states, targets)
    else:
        result = logprobs_and_entropy(nn.functional.linear(states, weight), targets)
    result[0].mean().backward()


def targets_of(loss: str, tokens: int) -> Targets:
    labels = torch.arange(tokens)
    if loss == "cross-entropy":
        return Targets(labels, is_summed=True)
    return Targets(labels, temperature=0.9, entropy="value")


def fake_peak(loss: str, tokens: int, hidden: int, dtype: torch.dtype, is_chunked: bool) -> float:
    """GiB beside states, weights and their gradients."""
    with FakeTensorMode():
        weight, states = make_inputs(tokens, hidden, dtype)
        tracker = MemTracker()
        tracker.track_external(weight, states)
        with tracker:
            loss_part(weight, states, targets_of(loss, tokens), is_chunked)
        total = tracker.get_tracker_snapshot("peak")[states.device]["Total"]
    return (total - 2 * weight.nbytes - 2 * states.nbytes) / GIB


def measure(loss: str, tokens: int, hidden: int, is_chunked: bool) -> tuple[float, float]:
    """CPU seconds, and GiB of resident memory."""
    torch.set_num_threads(1)
    weight, states = make_inputs(tokens, hidden, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF)
    loss_part(weight, states, targets_of(loss, tokens), is_chunked)
    after = resource.getrusage(resource.RUSAGE_SELF)
    grown = (after.ru_maxrss - before.ru_maxrss) * 1024 - weight.nbytes - states.nbytes
    return after.ru_utime - before.ru_utime, grown / GIB


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fake_only", action="store_true")
    is_fake_only = parser.parse_args().fake_only
    for loss in LOSSES:
        print(f"{loss}: all logits at once -> chunks")
        for dtype, tokens in itertools.product((torch.bfloat16, torch.float32), (4096, 8192, 16384)):
            plain, chunked = (fake_peak(loss, tokens, 4096, dtype, way) for way in (False, True))
            print(f"  {dtype}, {tokens} tokens: {plain:.2f} -> {chunked:.2f} GiB, {chunked / plain:.3f}")
        for tokens, hidden in () if is_fake_only else ((4096, 128), (1024, 1024)):
            ways = [False, True] * RUNS
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                arguments = [(loss, tokens, hidden, way) for way in ways]
                results = pool.starmap(measure, arguments, chunksize=1)
            (plain, plain_gib), (chunked, chunked_gib) = min(results[::2]), min(results[1::2])
            print(
                f"  {tokens} tokens, hidden size {hidden}: {plain:.2f} -> {chunked:.2f} CPU seconds,", end=" "
            )
            print(f"{chunked / plain:.2f}; {plain_gib:.2f} -> {chunked_gib:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()

"""Ranks: process group, seeds, logging on rank 0, collectives."""

import contextlib
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.runtime.options import UserError, reason
from common.runtime.patience import NO_LIMIT, patience, set_limit


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def ranks_in_words() -> str:
    """The number of ranks for messages: "1 rank", "2 ranks"."""
    count = os.environ.get("WORLD_SIZE", "1")
    return f"{count} rank{'s' * (count != '1')}"


def device() -> torch.device:
    """The device of this rank: its GPU, or the CPU on a machine without GPUs."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def on_cpu() -> bool:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() == "cpu"


def hardware() -> str:
    """Device and ranks for the log: "NVIDIA A100-SXM4-80GB; 4 ranks"."""
    cpu = f"CPU, {torch.get_num_threads()} threads per rank"
    return f"{cpu if on_cpu() else torch.cuda.get_device_name()}; {ranks_in_words()}"


def use_own_gpu() -> None:
    """Select the GPU of this rank, before anything uses CUDA and takes memory of another one."""
    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def use_deterministic_kernels() -> None:
    """Use CUDA kernels that give the same bytes every time; raises RuntimeError where torch has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # is for debugging, and slow
    torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def any_kernels() -> Iterator[None]:
    """Undo `use_deterministic_kernels` for code that is reproducible, but that torch would refuse."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic)


def init_distributed(timeout_minutes: float = 30.0) -> None:
    """Join the launcher's process group. Without a launcher, create a group of one rank.

    timeout_minutes: a collective that waits longer than this for a rank fails, except in `patience`.
    """
    import deepspeed
    import deepspeed.ops

    if dist.is_initialized():
        return
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0")  # any free port, for a single rank
    if on_cpu():
        # DeepSpeed would compile a shared-memory op for a minute or two; gloo does not need it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(minutes=timeout_minutes)
    # With such a store, a rank that has died is noticed, and one that tokenises may take its time.
    is_watched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    limit = NO_LIMIT if is_watched else timeout
    try:
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu() else None, timeout=limit, verbose=False)
        set_limit(timeout)
    except Exception as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the ranks cannot meet at {place} within {timeout_minutes:g} minutes: {reason(error)}"
        ) from error
    finally:
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # later groups, as of vLLM, have their own store


def seed_everything(seed: int, step: int) -> None:
    """Seed all random generators from the run's seed, the step and the rank.

    Call it at the start of each step. Resuming is then exact without saved generator states.
    """
    mixed = int(np.random.SeedSequence((seed, step, rank())).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def log(message: str) -> None:
    """Print a line on rank 0. Ignores a closed stdout."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            print(message, flush=True)


@lru_cache
def log_once(message: str) -> None:
    """Log each distinct message once: a model may be loaded several times."""
    log(message)


def first_few(names: Collection[str], most: int = 3) -> str:
    """List the first `most` names for messages, with the total if there are more."""
    listed = ", ".join([*names][:most])
    return listed if len(names) <= most else f"{listed}, ... ({len(names)} in all)"


def sum_over_ranks(*values: Tensor | float) -> list[float]:
    """Sum each scalar over all ranks, with one all-reduce. Returns floats."""
    stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in values])
    if dist.is_initialized() and dist.get_world_size() > 1:
        stacked = stacked.to(device())
        dist.all_reduce(stacked)
    return stacked.tolist()


def sum_tensor_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place. Shape and dtype must be the same on all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(part: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Gather the rows of all ranks in one tensor, on all ranks: part (b, ...) -> (count, ...).

    rows: indices of this rank's rows in the result. At most one rank may have a row; rows of no rank are 0.
    """
    result = torch.zeros(count, *part.shape[1:], dtype=part.dtype, device=part.device)
    return sum_tensor_over_ranks(result.index_copy_(0, torch.tensor(rows, device=part.device), part))


def gather_lists(part: Tensor, rows: Sequence[int], lengths: Tensor) -> list[Tensor]:
    """Gather the lists of all ranks, on all ranks, in one tensor that the result has views of.

    part: this rank's lists one after another. rows: their indices in the result. lengths: (count,) of all.
    """
    result = torch.zeros(int(lengths.sum()), dtype=part.dtype, device=part.device)
    lists = [*result.split(lengths.tolist())]
    for row, values in zip(rows, part.split(lengths[rows].tolist()), strict=True):
        lists[row].copy_(values)
    sum_tensor_over_ranks(result)
    return lists


def gather_objects(local: Any) -> list[Any]:
    """Gather one small Python object per rank, on all ranks, ordered by rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [local]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local)
    return parts


@patience()
def on_first_rank(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` on rank 0; its small result, UserError or OSError (as a UserError) reaches every rank."""
    problem, result = "", None
    if rank() == 0:
        try:
            result = work(*arguments)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    problem, result = gather_objects((problem, result))[0]
    if problem:
        raise UserError(problem)
    return result


def is_lost_contact(error: Exception) -> bool:
    """Whether a connection was lost: the consequence of an error on another rank."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()

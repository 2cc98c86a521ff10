"""The limit of collectives: --timeout_minutes, or none while some rank is busy with files."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from common.runtime.torch_internals import limit_collectives

NO_LIMIT = timedelta(days=20)  # fits 32 bits of milliseconds

_limit = NO_LIMIT
_is_patient = False


def set_limit(limit: timedelta) -> None:
    """A collective that waits longer than this for a rank fails, except in `patience`."""
    global _limit
    _limit = limit
    # DeepSpeed creates further groups without a timeout argument, so change torch's default too.
    c10d = dist.distributed_c10d
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = limit
    limit_collectives(limit)


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Collectives in this block have no limit: some rank may be busy with files. All ranks leave it together.

    The death of a rank ends the others all the same, see `process` and `contact`.
    """
    global _is_patient
    if _is_patient or not dist.is_initialized():
        yield
        return
    _is_patient = True
    limit_collectives(NO_LIMIT)
    try:
        yield
        dist.barrier()
    finally:
        _is_patient = False
        limit_collectives(_limit)

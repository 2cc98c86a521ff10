"""Names of torch that its documentation does not promise, one function each. Read from version 2.13."""

from datetime import timedelta

import torch.distributed as dist


def limit_collectives(limit: timedelta) -> None:
    """Set the limit of the next collectives in all process groups; there is no public way to change it."""
    c10d = dist.distributed_c10d
    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(limit, group)

"""Groups of ranks that share the rows of a batch; see --sequence_parallel."""

import os

from common.runtime.options import UserError, world_size

_ranks_per_row = 1


def share_rows_among(ranks: int) -> None:
    """Set the number of ranks in a group. Call it before a batch is divided.

    Raises UserError unless it divides the number of ranks, which options do not know before the launch.
    """
    global _ranks_per_row
    if world_size() % ranks:
        raise UserError(f"--sequence_parallel {ranks}: must divide the number of ranks, {world_size()}")
    _ranks_per_row = ranks


def ranks_per_row() -> int:
    return _ranks_per_row


def data_ranks() -> int:
    """Number of parts that a global batch is divided into: one per group, or per rank without groups."""
    return world_size() // _ranks_per_row


def data_rank() -> int:
    """Number of the part of this rank."""
    return int(os.environ.get("RANK", "0")) // _ranks_per_row

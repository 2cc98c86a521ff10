"""The limit of collectives, and blocks without one."""

import os
import time
from datetime import timedelta
from multiprocessing import Queue

import torch
import torch.distributed as dist

from common.runtime.contact import keep_contact
from common.runtime.distributed import init_distributed, on_first_rank
from common.runtime.patience import patience, set_limit
from launch.lib.free_port import free_port
from tests.ranks import FORK

LIMIT, LONGER = 0.5, 1.0  # seconds


def _as_rank(number: int, port: int) -> None:
    os.environ |= {
        "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "CROSS_RANK": str(number),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _wait(number: int, port: int, results: Queue) -> None:
    _as_rank(number, port)
    init_distributed()
    group = dist.new_group()
    set_limit(timedelta(seconds=LIMIT))
    on_first_rank(time.sleep, LONGER)
    with patience():
        time.sleep(LONGER * number)
        dist.all_reduce(torch.zeros(1), group=group)
        time.sleep(LONGER * (1 - number))
    results.put((number, "waited"))
    time.sleep(LONGER * (1 - number))
    try:
        dist.barrier()
    except RuntimeError as error:
        results.put((number, str(error)))
    _end(results)


def _meet(number: int, port: int, results: Queue) -> None:
    _as_rank(number, port)
    keep_contact(print)
    time.sleep(LONGER * (1 - number))
    init_distributed(timeout_minutes=LIMIT / 60)
    results.put((number, "met"))
    time.sleep(LONGER)
    _end(results)


def _end(results: Queue) -> None:
    results.close()
    results.join_thread()
    os._exit(0)


def _start(work, results: Queue) -> None:
    port = free_port()
    for number in (0, 1):
        FORK.Process(target=work, args=(number, port, results), daemon=True).start()


def test_ranks_wait_for_a_busy_one_within_patience_alone() -> None:
    """In all groups, and again not after the block."""
    results = FORK.Queue()
    _start(_wait, results)
    assert sorted(results.get(timeout=60) for _ in range(2)) == [(0, "waited"), (1, "waited")]
    number, error = results.get(timeout=60)
    assert number == 1 and "Timed out waiting 500ms" in error


def test_nodes_wait_for_one_that_still_tokenises() -> None:
    results = FORK.Queue()
    _start(_meet, results)
    assert sorted(results.get(timeout=60) for _ in range(2)) == [(0, "met"), (1, "met")]

"""Signs of life between the ranks of several nodes: a dead rank, node or network ends all ranks in a minute.

Every rank counts in a store at rank 0, where it finds the news of a failure. A collective would wait for a
dead rank until its own, much longer limit. The process group uses the same store, and so the same port.
"""

import contextlib
import os
import socket
import threading
import time
from bisect import bisect
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate

import torch.distributed as dist

from common.runtime.distributed import rank
from common.runtime.options import UserError, world_size

BEAT = 2.0  # seconds between signs of life
SILENCE = 40.0  # seconds without one, after which a rank or the network counts as dead
START = 60.0  # default of $NODE_WAIT: seconds within which all ranks must start
ADVICE = "a slow start needs a larger NODE_WAIT"
NEWS = "failure"


class Contact:
    """Keeps the contact in two threads: one may block in a dead network, the other judges the silence."""

    def __init__(self, on_failure: Callable[[str], None]) -> None:
        self._on_failure = on_failure
        self._address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self._start_limit = _start_limit()
        self._own_failure, self._has_reported = "", threading.Event()
        self._wake, self._is_closed = threading.Event(), False
        self._failure, self._has_failure = "", threading.Event()
        self._answered: float | None = None  # when the store has answered last
        self._began = time.monotonic()
        self._changed: dict[int, float] = {}  # on rank 0: when the count of each rank has changed last
        self._counts: dict[int, int] = {}
        self._server = _serve(self._address) if rank() == 0 else None
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # for `init_distributed`, which joins the store
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._judge)]
        for thread in self._threads:
            thread.start()

    def report(self, failure: str) -> None:
        """Pass a failure of this rank on to the others, in one line."""
        if self._has_failure.is_set():
            return
        self._own_failure = f"{_name(rank())}: {failure}"
        self._wake.set()
        self._has_reported.wait(5.0)
        if rank() == 0:
            time.sleep(2 * BEAT)  # the store ends with this process

    def failure(self) -> str:
        """Wait for the news of the failure that has cut a connection. Returns "" if there is none."""
        self._has_failure.wait(SILENCE + 2 * BEAT)
        return self._failure

    def close(self) -> None:
        """End the threads; a store must not be in use when Python ends."""
        self._is_closed = True
        self._wake.set()
        for thread in self._threads:
            thread.join(BEAT)

    def _judge(self) -> None:
        while not self._has_failure.wait(0.5):
            if self._is_closed:
                return
            now = time.monotonic()
            if self._answered is None and now - self._began > self._start_limit:
                limit = f"{self._start_limit:g} s ({ADVICE})"
                self._fail(f"{self._first_node()}: no answer within {limit} of the start")
            elif self._answered is not None and now - self._answered > SILENCE:
                self._fail(f"{self._first_node()}: no sign of life for {SILENCE:g} s")
        self._on_failure(self._failure)

    def _fail(self, failure: str) -> None:
        if not self._failure:
            self._failure = failure
        self._has_failure.set()

    def _first_node(self) -> str:
        return "node 0 ({}:{})".format(*self._address)

    def _beat(self) -> None:
        try:
            store = self._connect()
            self._enrol(store)
            while not (self._is_closed or self._has_failure.is_set()):
                store.add(f"beat/{rank()}", 1)
                self._answered = time.monotonic()
                if self._own_failure or rank() == 0:
                    self._tell(store, self._own_failure or self._silent(store))
                if store.check([NEWS]):
                    self._fail(store.get(NEWS).decode())
                self._wake.wait(BEAT)
        except dist.DistError:
            self._fail(f"{self._first_node()}: its rank 0 has ended")

    def _connect(self) -> dist.Store:
        """Connect to the store when it listens. torch's own attempts would fill the log."""
        while not (self._is_closed or self._has_failure.is_set()):
            with contextlib.suppress(OSError):
                socket.create_connection(self._address, timeout=BEAT).close()
                break
            time.sleep(0.5)
        store = dist.TCPStore(*self._address, is_master=False, timeout=timedelta(seconds=SILENCE))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # by torchrun, whose store lives on
        return dist.PrefixStore(f"triptych/{attempt}", store)

    def _enrol(self, store: dist.Store) -> None:
        """End this rank if it does not belong to the run of the store: another run may use the same port."""
        expected = store.compare_set("ranks", "", str(world_size())).decode()
        if expected != str(world_size()):
            numbers = f"{world_size()} ranks here, {expected} on node 0"
            self._fail(f"{_name(rank())}: {numbers}; NNODES and NUM_GPUS must be the same on all nodes")
        elif store.add(f"start/{rank()}", 1) > 1:
            self._fail(
                f"{_name(rank())}: started twice; NODE_RANK and MASTER_PORT belong to one node and run"
            )
        else:
            store.set(f"name/{rank()}", _name(rank()))

    def _tell(self, store: dist.Store, failure: str) -> None:
        if failure:
            store.compare_set(NEWS, "", failure)
            self._has_reported.set()

    def _silent(self, store: dist.Store) -> str:
        """The first rank that has not started, or has been silent for too long."""
        now = time.monotonic()
        for other in range(world_size()):
            count = store.add(f"beat/{other}", 0)
            if count != self._counts.get(other, 0):
                self._counts[other], self._changed[other] = count, now
            if not count and now - self._began > self._start_limit:
                limit = f"{self._start_limit:g} s ({ADVICE})"
                return f"node {_node_of(other)}: rank {other} has not started within {limit}"
            if count and now - self._changed[other] > SILENCE:
                name = store.get(f"name/{other}").decode()
                return f"{name}: no sign of life for {SILENCE:g} s"
        return ""


def keep_contact(on_failure: Callable[[str], None]) -> Contact | None:
    """Start to exchange signs of life; nothing on one node. on_failure gets one line about a dead rank."""
    return Contact(on_failure) if world_size() > _ranks_here() else None


def _ranks_here() -> int:
    """Number of ranks on this node, set by DeepSpeed or torchrun."""
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", world_size())))


def _node_of(number: int) -> int:
    """The node of a rank, also of one that has not started; $TRIPTYCH_SLOTS, by hosts.py: ranks per node."""
    slots = [int(count) for count in os.environ.get("TRIPTYCH_SLOTS", "").split()]
    ends = [*accumulate(slots or [_ranks_here()] * world_size())]
    return bisect(ends, number)


def _name(number: int) -> str:
    node = os.environ.get("CROSS_RANK", os.environ.get("GROUP_RANK", "?"))  # by DeepSpeed; by torchrun
    return f"node {node} ({socket.gethostname()}), rank {number}"


def _start_limit() -> float:
    value = os.environ.get("NODE_WAIT") or f"{START}"
    if not value.replace(".", "", 1).isdecimal():
        raise UserError(f"NODE_WAIT {value}: must be a number of seconds")
    return float(value)


def _serve(address: tuple[str, int]) -> dist.Store | None:
    """The store of rank 0; None under torchrun, which has one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    try:
        return dist.TCPStore(*address, is_master=True, wait_for_workers=False)
    except dist.DistError as error:
        raise UserError(f"MASTER_PORT {address[1]}: rank 0 cannot listen on it; choose another") from error

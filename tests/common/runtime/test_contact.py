"""Ranks of two nodes, as processes on this machine: each failure reaches the others in one line."""

import os
import queue
import signal
import time
from collections.abc import Iterator
from multiprocessing import Queue

import pytest

from common.runtime import contact
from common.runtime.contact import ADVICE, Contact, keep_contact
from common.runtime.options import UserError
from launch.lib.free_port import free_port
from tests.ranks import FORK

pytestmark = pytest.mark.end_to_end  # processes as ranks, and seconds of waiting


def _rank(port: int, number: int, world: int, failure: str, news: Queue, names: dict[str, str]) -> None:
    os.environ |= {
        "RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_SIZE": "1", "CROSS_RANK": str(number),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_WAIT": "6", **names,
    }  # fmt: skip
    contact.SILENCE, contact.BEAT = 3.0, 0.2
    signs = keep_contact(lambda line: news.put((number, line)))
    news.put((number, "began"))
    if failure:
        time.sleep(1)
        signs.report(failure)
    time.sleep(60)


@pytest.fixture
def news() -> Iterator[Queue]:
    """What the ranks hear; all processes end with the test."""
    news = FORK.Queue()
    news.port, news.children = free_port(), {}
    yield news
    for child in news.children.values():
        child.kill()
        child.join()


def start(news: Queue, number: int, failure: str = "", world: int = 3, **names: str) -> None:
    child = FORK.Process(target=_rank, args=(news.port, number, world, failure, news, names), daemon=True)
    news.children[len(news.children)] = child
    child.start()


def heard(news: Queue, count: int, seconds: float = 30) -> dict[int, str]:
    """The first news of `count` ranks."""
    lines: dict[int, str] = {}
    end = time.monotonic() + seconds
    while len(lines) < count:
        number, line = news.get(timeout=max(0.0, end - time.monotonic()))
        if line != "began":
            lines[number] = line.replace(contact.socket.gethostname(), "HOST")
    return lines


def begin(news: Queue, failures: tuple[str, ...]) -> None:
    for number, failure in enumerate(failures):
        start(news, number, failure)
    for _ in failures:
        assert news.get(timeout=30)[1] == "began"
    time.sleep(1.5)


def test_failure_is_passed_on(news: Queue) -> None:
    begin(news, ("", "", "ValueError: no"))
    assert heard(news, 3) == dict.fromkeys(range(3), "node 2 (HOST), rank 2: ValueError: no")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_silent_rank(news: Queue, number: int) -> None:
    """Killed, or on a node that hangs."""
    begin(news, ("", "", ""))
    os.kill(news.children[1].pid, number)
    assert heard(news, 2) == dict.fromkeys((0, 2), "node 1 (HOST), rank 1: no sign of life for 3 s")


def test_first_rank_is_killed(news: Queue) -> None:
    begin(news, ("", "", ""))
    news.children[0].kill()
    line = f"node 0 (127.0.0.1:{news.port}): its rank 0 has ended"
    assert heard(news, 2) == dict.fromkeys((1, 2), line)


def test_first_node_hangs(news: Queue) -> None:
    begin(news, ("", "", ""))
    os.kill(news.children[0].pid, signal.SIGSTOP)
    line = f"node 0 (127.0.0.1:{news.port}): no sign of life for 3 s"
    assert heard(news, 2) == dict.fromkeys((1, 2), line)


def test_rank_that_never_starts(news: Queue) -> None:
    begin(news, ("", ""))
    assert heard(news, 2) == dict.fromkeys((0, 1), f"node 2: rank 2 has not started within 6 s ({ADVICE})")


def test_first_node_never_starts(news: Queue) -> None:
    start(news, 1)
    line = f"node 0 (127.0.0.1:{news.port}): no answer within 6 s ({ADVICE}) of the start"
    assert heard(news, 1) == {1: line}


def test_other_number_of_ranks(news: Queue) -> None:
    """Ends the rank that differs: it may belong to another run on the same port."""
    begin(news, ("", "", ""))
    start(news, 1, world=4)
    line = (
        "node 1 (HOST), rank 1: 4 ranks here, 3 on node 0; NNODES and NUM_GPUS must be the same on all nodes"
    )
    assert heard(news, 1) == {1: line}
    with pytest.raises(queue.Empty):
        heard(news, 1, seconds=5)


def test_two_nodes_with_one_number(news: Queue) -> None:
    begin(news, ("", "", ""))
    start(news, 1)
    line = "node 1 (HOST), rank 1: started twice; NODE_RANK and MASTER_PORT belong to one node and run"
    assert heard(news, 1) == {1: line}
    with pytest.raises(queue.Empty):
        heard(news, 1, seconds=5)


def test_no_news_without_a_failure(news: Queue) -> None:
    begin(news, ("", "", ""))
    with pytest.raises(queue.Empty):
        heard(news, 1, seconds=8)


def test_one_node_needs_no_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv(name, "2")
        assert keep_contact(print) is None
        monkeypatch.delenv(name)


def test_wrong_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NODE_WAIT": "long", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="NODE_WAIT long: must be a number of seconds"):
        Contact(print)

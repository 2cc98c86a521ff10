"""Progress lines of long passes."""

import pytest

from common import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until the test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_after_two_seconds_and_then_every_ten(clock: list[float], capsys) -> None:
    passing = progress.Progress("scoring", total=100)
    for second in range(1, 25):
        clock[0] = 100.0 + second
        passing.update(4 * second)
    assert capsys.readouterr().out.splitlines() == [
        "scoring: 8/100 (8%) | 4/s | ETA 0:00:23",
        "scoring: 48/100 (48%) | 4/s | ETA 0:00:13",
        "scoring: 88/100 (88%) | 4/s | ETA 0:00:03",
    ]


def test_the_rate_is_that_of_this_run(clock: list[float], capsys) -> None:
    """Items that an earlier run has finished took no time now."""
    passing = progress.Progress("reading", total=1000, done=900)
    clock[0] += 5
    assert passing.update(910)
    assert capsys.readouterr().out == "reading: 910/1000 (91%) | 2/s | ETA 0:00:45\n"


def test_a_short_pass_is_silent(clock: list[float], capsys) -> None:
    passing = progress.Progress("reading", total=10)
    clock[0] += 1.9
    assert not passing.update(10)
    assert capsys.readouterr().out == ""

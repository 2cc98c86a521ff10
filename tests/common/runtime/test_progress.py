"""Progress lines of long passes."""

import pytest

from common.runtime import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the test advances."""
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


def test_rate_counts_only_items_of_this_run(clock: list[float], capsys) -> None:
    """Items of an earlier run took no time."""
    passing = progress.Progress("reading", total=1000, done=900)
    clock[0] += 5
    assert passing.update(910)
    assert capsys.readouterr().out == "reading: 910/1000 (91%) | 2/s | ETA 0:00:45\n"


def test_short_pass_logs_nothing(clock: list[float], capsys) -> None:
    passing = progress.Progress("reading", total=10)
    clock[0] += 1.9
    assert not passing.update(10)
    assert capsys.readouterr().out == ""


def test_last_line_has_the_elapsed_time(clock: list[float], capsys) -> None:
    passing = progress.Progress("reading", total=4)
    for done in range(1, 5):
        clock[0] += 3
        passing.update(done)
    assert capsys.readouterr().out.splitlines()[-1] == "reading: 4/4 (100%) | 0.333/s | took 0:00:12"


def test_progress_counts_batches_of_all_ranks(clock: list[float], capsys) -> None:
    """37 rows in five rounds; this rank has no rows in the last two."""
    batches, seen = [[0, 1], [2], [3], [], []], []
    for batch in progress.track("scoring", batches, total=37):
        seen.append(batch)
        clock[0] += 3
    assert seen == batches
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "scoring: 7/37 (19%) | 2.33/s | ETA 0:00:12"
    assert last == "scoring: 37/37 (100%) | 2.47/s | took 0:00:15"


def test_progress_of_reading_uses_the_share_of_the_file(clock: list[float], capsys) -> None:
    reading = progress.ReadingProgress("data.jsonl: tokenising")
    for count, share in ((100, 0.01), (1000, 0.1), (5000, 0.5)):
        clock[0] += 1.5
        reading.update(count, share)
    clock[0] += 10
    reading.update(9000, 0.9)
    assert capsys.readouterr().out.splitlines() == [
        "data.jsonl: tokenising: 1000 records (10%) | 333/s | ETA 0:00:27",
        "data.jsonl: tokenising: 9000 records (90%) | 621/s | ETA 0:00:01",
    ]

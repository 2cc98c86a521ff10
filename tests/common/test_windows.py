"""Long work: whatever is done at once, wherever it is stopped or killed, the same comes of it, and once."""

from pathlib import Path

import pytest

import common.windows
from common.process import Stopped
from common.windows import work_through

ITEMS = [f"item {n}" for n in range(11)]
MADE = [{"number": n, "item": item} for n, item in enumerate(ITEMS)]


def test_it_goes_on_after_a_stop_and_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, asked, calls = tmp_path / "journal", [], []
    monkeypatch.setattr(common.windows, "stop_requested", lambda folder: asked.append(folder) or stops())

    def work(items: dict[int, str]) -> list[dict]:
        calls.append([*items])
        return [{"number": number, "item": item} for number, item in items.items()]

    def stops() -> bool:
        return len(calls) == 2

    with pytest.raises(Stopped, match="the same command goes on"):
        work_through(ITEMS, work, journal, 3)
    assert calls == [[0, 1, 2], [3, 4, 5]] and set(asked) == {str(tmp_path)}
    with journal.open("a") as file:
        file.write('[{"number": 6, "item"')  # killed while it wrote
    calls += [[]]
    assert work_through(ITEMS, work, journal, 2) == MADE
    assert calls[3:] == [[6, 7], [8, 9], [10]]
    assert work_through(ITEMS, work, journal, 5) == MADE and len(calls) == 6

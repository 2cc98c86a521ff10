"""Resumable batch processing: same results with any batch size, after stops and kills; no item runs twice."""

import re
from pathlib import Path

import pytest

import common.data.journal
from common.data.journal import work_through
from common.runtime import process
from common.runtime.options import UserError
from common.runtime.process import Stopped

ITEMS = [f"item {n}" for n in range(11)]
MADE = [{"number": n, "item": item} for n, item in enumerate(ITEMS)]


def test_resumes_after_a_stop_and_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    journal, asked, calls = tmp_path / "journal", [], []
    monkeypatch.setattr(common.data.journal, "stop_requested", lambda folder: asked.append(folder) or stops())

    def work(items: dict[int, str]) -> list[dict]:
        calls.append([*items])
        return [{"number": number, "item": item} for number, item in items.items()]

    def stops() -> bool:
        return len(calls) == 2

    message = f"Stopped; 6 of 11 texts done, saved in {tmp_path}. Run the same command to resume."
    with pytest.raises(Stopped, match=re.escape(message)):
        work_through(ITEMS, work, journal, 3, "texts")
    assert calls == [[0, 1, 2], [3, 4, 5]] and set(asked) == {str(tmp_path)}
    with journal.open("a") as file:
        file.write('[{"number": 6, "item"')  # killed while writing
    calls += [[]]
    assert work_through(ITEMS, work, journal, 2, "texts") == MADE
    assert capsys.readouterr().out == "resuming: 6 of 11 texts done\n"
    assert calls[3:] == [[6, 7], [8, 9], [10]]
    assert work_through(ITEMS, work, journal, 5, "texts") == MADE and len(calls) == 6


def test_a_stop_waits_once_all_items_are_done(tmp_path: Path) -> None:
    """Before that, a stop ends a rank at once and prints the number of finished items."""
    lines = []

    def work(items: dict[int, str]) -> list[str]:
        lines.append(process._last_line)
        return [*items.values()]

    for _ in range(2):
        assert work_through(ITEMS, work, tmp_path / "journal", 6, "texts") == ITEMS
        assert process._last_line is None
    assert [line.split(", ")[0] for line in lines] == [f"Stopped; {n} of 11 texts done" for n in (0, 6)]


@pytest.mark.parametrize("line", [b"\x00\xff", b"{}", b"7", b'["cut', b"[" * 99_999])
def test_damaged_journal_is_named_and_not_changed(tmp_path: Path, line: bytes) -> None:
    content = b"[1, 2]\n" + line + b"\n[3]\n"
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(UserError, match="journal:2: damaged"):
        work_through(range(4), lambda items: [*items], tmp_path / "journal", 2, "items")
    assert (tmp_path / "journal").read_bytes() == content

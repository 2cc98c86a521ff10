"""The README's picture, drawn from a small made-up quickstart."""

import json
import sys
from pathlib import Path

import pytest

from launch.quickstart import picture


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    folder = tmp_path / "quickstart"
    (folder / "step3_ppo").mkdir(parents=True)
    lines = [
        {"step": 0, "eval/score": -0.5},
        {"step": 5, "reward/mean": 0.1},
        {"step": 10, "reward/mean": 0.9},
    ]
    (folder / "step3_ppo/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "report.json").write_text(json.dumps({"gold_sft": 0.25, "gold_ppo": 0.75}))
    return folder


def draw(monkeypatch: pytest.MonkeyPatch, quickstart: Path, output: Path) -> dict[str, bytes]:
    output.mkdir(exist_ok=True)
    options = ["--quickstart_dir", str(quickstart), "--output_dir", str(output)]
    monkeypatch.setattr(sys, "argv", ["picture.py", *options])
    picture.main()
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_the_same_runs_give_the_same_pictures_in_both_themes(quickstart, tmp_path, monkeypatch):
    first, second = (draw(monkeypatch, quickstart, tmp_path / name) for name in ("first", "second"))
    assert first.keys() == {"quickstart_light.svg", "quickstart_dark.svg"}
    assert first == second
    for theme in ("light", "dark"):
        drawn = first[f"quickstart_{theme}.svg"].decode()
        assert picture.THEMES[theme]["gold"] in drawn


def test_a_folder_without_runs_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        draw(monkeypatch, tmp_path / "nothing", tmp_path / "output")
    error = capsys.readouterr().err
    assert "not a finished quickstart" in error and error.count("\n") == 1

"""The table of the rounds: each figure comes from the file of the command that measured it."""

import json
from pathlib import Path

from tests.ranks import succeed


def write(path: Path, *records: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def make_rounds(folder: Path) -> None:
    """Two rounds; the reward model of the second was evaluated twice."""
    for number, (pairs, accuracies) in enumerate(((3, (0.7,)), (2, (0.5, 0.8))), start=1):
        here = folder / f"round_{number}"
        write(here / "labels/preferences.jsonl", *[{}] * pairs)
        lines = [{"step": step, "eval/accuracy": one} for step, one in enumerate(accuracies)]
        write(here / "step2_reward/metrics.jsonl", *lines, {"step": 9, "train/loss": 0.1})
    write(folder / "round_2/shift/report.json", {"accuracy": {"accuracy": 0.6, "pairs": 2}})


def test_figures_of_rounds_and_policies(tmp_path: Path) -> None:
    """Before the comparison of the policies, and after it. Round 0 is the first policy."""
    make_rounds(tmp_path)
    succeed("launch.online.table", ["--output_dir", str(tmp_path)], tmp_path / "logs")
    nothing = {"score": None, "gold": None, "kl": None}
    first = {"round": 0, "pairs": None, "former_accuracy": None, "accuracy": None}
    second = {"round": 1, "pairs": 3, "former_accuracy": None, "accuracy": 0.7}
    third = {"round": 2, "pairs": 2, "former_accuracy": 0.6, "accuracy": 0.8}
    assert read(tmp_path) == [one | nothing for one in (first, second, third)]

    policies = [
        {"scores": {"reward model": {"mean": n + 0.5}, "gold score": {"mean": n / 4}}, "kl": {"mean": 2 * n}}
        for n in range(3)
    ]
    write(tmp_path / "report/report.json", {"policies": policies})
    succeed("launch.online.table", ["--output_dir", str(tmp_path)], tmp_path / "logs")
    scores = [{"score": n + 0.5, "gold": n / 4, "kl": 2 * n} for n in range(3)]
    assert read(tmp_path) == [a | b for a, b in zip((first, second, third), scores, strict=True)]
    printed = max((tmp_path / "logs").glob("*.log")).read_text()
    assert "| 2 | 2 | 0.600 | 0.800 | 2.500 | 0.500 | 4 |\n" in printed
    assert "| 0 |  |  |  | 0.500 | 0.000 | 0 |\n" in printed
    assert (tmp_path / "rounds.png").stat().st_size > 5000


def test_a_round_after_the_comparison_has_no_policy_yet(tmp_path: Path) -> None:
    """A third round was added to two compared ones; without a gold function there is no gold score."""
    make_rounds(tmp_path)
    write(tmp_path / "round_3/labels/preferences.jsonl", {})
    policies = [{"scores": {"reward model": {"mean": 1.0}}, "kl": {"mean": 0.0}}] * 3
    write(tmp_path / "report/report.json", {"policies": policies})
    succeed("launch.online.table", ["--output_dir", str(tmp_path)], tmp_path / "logs")
    assert [one["score"] for one in read(tmp_path)] == [1.0, 1.0, 1.0, None]
    assert [one["gold"] for one in read(tmp_path)] == [None] * 4

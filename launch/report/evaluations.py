"""Reports of the evaluation commands as text and pictures."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from common.runtime.options import reason
from launch.report.curves import Picture
from launch.report.rule import Finding


class Kind(NamedTuple):
    """An evaluation command."""

    title: str
    keys: set[str]  # of report.json, by which it is recognised
    printer: str = ""  # the function by which the command prints its report
    pictures: dict[str, str] = {}  # plots beside the report, and their descriptions


COMMANDS = [
    Kind("Comparison of policies", {"policies", "best_of", "prompts"}, "step3_ppo.compare.report.table",
         {"scores.png": "Scores of policies over the root of KL"}),
    Kind("Reward model on held-out pairs", {"accuracy", "accuracy_by", "prediction"},
         "step2_reward.evaluation.report_text.table",
         {"reliability.png": "Calibration of the reward model", "scores.png": "Histogram of scores"}),
    Kind("Judge", {"judged", "position", "agreement"}, "step2_reward.judge.report.format_judge_metrics"),
    Kind("Best of n", {"samples", "demonstrations", "preferences"},
         "step3_ppo.best_of_n.report.describe_selection"),
    Kind("Quickstart: before and after PPO", {"gold_sft", "gold_ppo", "gold_win_rate"},
         pictures={"report.png": "Score and KL over the steps of PPO"}),
]  # fmt: skip


class Evaluation(NamedTuple):
    """The output folder of an evaluation, with its report.json."""

    folder: Path
    kind: Kind
    figures: dict[str, Any]


def render_evaluation(evaluation: Evaluation) -> tuple[str, list[Finding], list[str]]:
    """The report as text, the findings of its command, and sentences about unreadable parts."""
    figures, printer = evaluation.figures, evaluation.kind.printer
    try:
        text = resolve_name(printer)(figures) if printer else _flat(figures)
        return text, [Finding(one["found"], one["advice"]) for one in figures.get("verdicts", [])], []
    except Exception as error:  # noqa: BLE001 - a damaged report raises anything; the user needs the reason
        return "", [], [f"{evaluation.folder / 'report.json'}: cannot be shown: {reason(error)}."]


def pictures_of(evaluation: Evaluation) -> list[Picture]:
    """Plots that the command wrote beside its report."""
    paths = {evaluation.folder / name: alt for name, alt in evaluation.kind.pictures.items()}
    return [Picture(path, alt) for path, alt in paths.items() if path.is_file()]


def _flat(figures: dict[str, Any]) -> str:
    """One line per number."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    width = max(map(len, numbers), default=0)
    return "\n".join(f"{name:{width}}  {value:.4g}" for name, value in numbers.items())

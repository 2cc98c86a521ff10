"""Reports of the evaluation commands as text and pictures."""

from collections.abc import Callable
from typing import Any

from common.runtime.options import reason
from launch.report.curves import Picture
from launch.report.rule import Finding
from launch.report.scan import Evaluation

TITLES = {
    "compare": "Comparison of policies",
    "reward": "Reward model on held-out pairs",
    "judge": "Judge",
    "best_of_n": "Best of n",
    "quickstart": "Quickstart: before and after PPO",
}
PICTURES = {
    "compare": {"scores.png": "Scores of policies over the root of KL"},
    "reward": {"reliability.png": "Calibration of the reward model", "scores.png": "Histogram of scores"},
    "quickstart": {"report.png": "Score and KL over the steps of PPO"},
}


def render_evaluation(evaluation: Evaluation) -> tuple[str, list[Finding], list[str]]:
    """The report as text, the findings of its command, and sentences about unreadable parts."""
    try:
        text = _renderer(evaluation.kind)(evaluation.figures)
        verdicts = evaluation.figures.get("verdicts", [])
        return text, [Finding(one["found"], one["advice"]) for one in verdicts], []
    except Exception as error:  # noqa: BLE001 - a damaged report raises anything; the user needs the reason
        return "", [], [f"{evaluation.folder / 'report.json'}: cannot be shown: {reason(error)}."]


def pictures_of(evaluation: Evaluation) -> list[Picture]:
    """Plots that the command wrote beside its report."""
    known = PICTURES.get(evaluation.kind, {})
    paths = {evaluation.folder / name: alt for name, alt in known.items()}
    return [Picture(path, alt) for path, alt in paths.items() if path.is_file()]


def _renderer(kind: str) -> Callable[[dict[str, Any]], str]:
    """The function by which the command prints its report."""
    if kind == "compare":
        from step3_ppo.compare.report import table

        return table
    if kind == "reward":
        from step2_reward.evaluation.report_text import table

        return table
    if kind == "judge":
        from step2_reward.judge.report import format_judge_metrics

        return format_judge_metrics
    if kind == "best_of_n":
        from step3_ppo.best_of_n.report import describe_selection

        return describe_selection
    return _flat


def _flat(figures: dict[str, Any]) -> str:
    """One line per number."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    width = max(map(len, numbers), default=0)
    return "\n".join(f"{name:{width}}  {value:.4g}" for name, value in numbers.items())

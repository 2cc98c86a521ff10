"""Options of trackers, and their check. Loads no library."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from common.runtime.options import UserError, option

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]
# Of the trackers that requirements.txt lacks; one of them must be installed.
PACKAGES = {"wandb": ["wandb"], "mlflow": ["mlflow-skinny", "mlflow"], "trackio": ["trackio"]}


@dataclass
class TrackerOptions:
    """Trackers."""

    report_to: list[Tracker] = option(
        ["tensorboard"],
        "Trackers that get the metrics, one or several, or none; metrics.jsonl is written in any case.",
        resume="free",
    )


def check_trackers(options: TrackerOptions) -> None:
    """Raise UserError for `none` among trackers, and for a tracker whose package is not installed."""
    names = options.report_to
    if "none" in names and len(names) > 1:
        raise UserError(f"--report_to {' '.join(names)}: none excludes the others")
    for name in names:
        packages = PACKAGES.get(name, [])
        if packages and not any(map(_is_installed, packages)):
            raise UserError(
                f"--report_to {name}: {packages[0]} is not installed: .venv/bin/pip install"
                f" -r requirements.txt -r common/training/requirements-{name}.txt"
            )


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False

"""Find training runs and reports of this suite below a folder."""

import re
from pathlib import Path
from typing import NamedTuple

from common.data.sources import CLICKS, KINDS
from common.runtime.options import UserError
from launch.report.evaluations import COMMANDS, Evaluation
from launch.report.read import Run, read_json, read_run
from launch.report.stages import Stage, stage_of

DEEPEST = 4  # folders below the given one: OUT/raft/round_1/samples
MOST_FOLDERS = 2000  # scanned at most
PARTS_OF_RUNS = {
    "checkpoints", "tensorboard", "wandb", "mlruns", "final", "best", "final_ema", "final_critic", "golden",
}  # fmt: skip


class Seen(NamedTuple):
    """Contents of a folder, in the order of the paths."""

    runs: list[Run]
    evaluations: list[Evaluation]
    others: list[str]  # path and kind of folders that the page does not show
    problems: list[str]
    folders: list[Path]  # all scanned folders, in order


def scan(root: Path) -> Seen:
    """Scan a folder and the folders below it. Raises UserError when there is nothing to report."""
    if not root.is_dir():
        raise UserError(f"{root}: {'is a file, not an output folder' if root.exists() else 'no such folder'}")
    folders, is_cut = _folders(root)
    seen = Seen([], [], [], [], folders)
    try:
        for folder in folders:
            _look(folder, root, seen)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror or error}") from None
    if is_cut:
        seen.problems.append(f"{root}: has more than {MOST_FOLDERS} folders; the others were skipped.")
    if not (seen.runs or seen.evaluations or seen.others):
        raise UserError(
            f"{root}: no output of this suite here or below; give the --output_dir of a command, or a"
            " folder of such folders"
        )
    return seen


def _look(folder: Path, root: Path, seen: Seen) -> None:
    """Add the contents of one folder."""
    options, options_problems = read_json(folder / "options.json")
    options.pop("given", None)  # not an option: names of the options on the command line
    stage = stage_of(options) if options else None
    figures, report_problems = read_json(folder / "report.json")
    kind = next((kind for kind in COMMANDS if kind.keys <= figures.keys()), None)
    is_run = stage.trains if stage else (folder / "metrics.jsonl").is_file()
    if is_run:
        seen.runs.append(read_run(folder, stage, options, options_problems))
    else:
        seen.problems.extend(options_problems)
    if kind:
        seen.evaluations.append(Evaluation(folder, kind, figures))
    seen.problems.extend(report_problems)
    if not is_run and not kind and (other := _other_kind(folder, stage)):
        name = str(folder.relative_to(root)) if folder != root else folder.resolve().name
        seen.others.append(f"{name} ({other})")


def _other_kind(folder: Path, stage: Stage | None) -> str:
    """Kind of a folder without run and report, in a word; empty if it holds no known files."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if stage is not None:
        return stage.title
    if "config.json" in names:
        return "model"
    if any(name.endswith(CLICKS) for name in names):
        return "annotations"
    return "data" if any(name.endswith(KINDS) for name in names) else ""


def _folders(root: Path) -> tuple[list[Path], bool]:
    """The folder and those below it, without subfolders of runs; and whether some were skipped."""
    folders, queue = [], [root]
    while queue and len(folders) < MOST_FOLDERS:
        folder = queue.pop(0)
        folders.append(folder)
        if len(folder.relative_to(root).parts) < DEEPEST:
            try:
                below = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
            except PermissionError:
                continue
            is_run = any((folder / name).exists() for name in ("options.json", "metrics.jsonl"))
            skipped = PARTS_OF_RUNS if is_run else set()
            queue += [p for p in below if p.name not in skipped and not p.name.startswith(".")]
    return sorted(folders, key=lambda path: _natural(path.relative_to(root))), bool(queue)


def _natural(path: Path) -> list[list[tuple[int, str]]]:
    """Sort key that puts round_2 before round_10."""
    return [
        [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
        for name in path.parts
    ]

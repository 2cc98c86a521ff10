"""What a run left in its folder: metrics, options, samples, and step 2's report on golden pairs."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.options import UserError

Line = dict[str, Any]
USES = {
    "metrics.jsonl": "no curves, and nothing to judge",
    "options.json": "no options",
    "samples.jsonl": "no samples",
    "golden/report.json": "no accuracy on --golden_data",
}


class Run(NamedTuple):
    """One output folder of a step; what is not there is empty."""

    folder: Path
    title: str
    lines: list[Line]  # metrics.jsonl
    options: dict[str, Any]
    known: dict[str, tuple[Any, str]]  # the default and the help of every option of the step
    samples: list[Line]
    golden: dict[str, Any]
    absent: list[str]  # in words


def find_runs(folder: Path) -> list[Run]:
    """The run in a folder, or else those in the folders that it holds, by name. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    if found := [folder] if _is_run(folder) else [path for path in inside if _is_run(path)]:
        stages = known_options()
        return [_read_run(path, stages) for path in found]
    raise UserError(
        f"{folder}: no run here, nor in a folder right below: metrics.jsonl or options.json would tell"
    )


def columns(lines: Sequence[Line], *names: str) -> list[list[float]]:
    """Values of some metrics, a list for each, from the lines that hold all of them as finite numbers."""
    rows = [[line.get(name) for name in names] for line in lines]
    whole = [row for row in rows if all(value is not None and math.isfinite(value) for value in row)]
    return [[row[place] for row in whole] for place in range(len(names))]


def known_options() -> dict[str, dict[str, tuple[Any, str]]]:
    """The default and the help of every option, by step."""
    from step1_sft.options import SFTOptions
    from step2_reward.direct.options import DirectOptions
    from step2_reward.options import RewardOptions
    from step3_ppo.options import PPOOptions

    classes = {
        "Step 1: supervised fine-tuning": SFTOptions,
        "Step 2: reward model": RewardOptions,
        "Step 2: direct preference optimisation": DirectOptions,
        "Step 3: PPO": PPOOptions,
    }
    return {step: _defaults(options()) for step, options in classes.items()}


def _defaults(options: Any) -> dict[str, tuple[Any, str]]:
    fields = dataclasses.fields(options)
    return {field.name: (getattr(options, field.name), field.metadata["help"]) for field in fields}


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (folder / "options.json").is_file()


def _read_run(folder: Path, stages: dict[str, dict[str, tuple[Any, str]]]) -> Run:
    options = _read_json(folder / "options.json")
    # The step is the one that has these options; the nearest one, as a run may be of another version.
    title = min(stages, key=lambda step: len(stages[step].keys() ^ options.keys())) if options else "Run"
    expected = ["metrics.jsonl", "options.json"]
    expected += ["samples.jsonl"] * title.startswith("Step 3")
    expected += ["golden/report.json"] * bool(options.get("golden_data"))
    return Run(
        folder=folder,
        title=title,
        lines=_read_lines(folder / "metrics.jsonl"),
        options=options,
        known=stages.get(title, {}),
        samples=_read_lines(folder / "samples.jsonl"),
        golden=_read_json(folder / "golden/report.json"),
        absent=[f"{name} is absent: {USES[name]}." for name in expected if not (folder / name).exists()],
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _read_lines(path: Path) -> list[Line]:
    """Records of a JSONL file; the last line may still be in the making."""
    # Not `splitlines`: texts may hold other characters that it takes for the end of a line.
    texts = path.read_text(encoding="utf-8").rstrip("\n").split("\n") if path.exists() else []
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
    return lines

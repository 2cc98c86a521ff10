"""Read the folder of a training run: metrics, options, samples, and the report of step 2 on golden pairs.

Files may be damaged: readable parts are returned, and `problems` lists the skipped ones.
"""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.runtime.damaged_jsonl import is_number, read_lines, read_metrics, skipped_message
from common.runtime.options import reason
from launch.report.stages import Known, Stage

Line = dict[str, Any]
USES = {
    "metrics.jsonl": "no curves, and nothing to check",
    "options.json": "no options",
    "samples.jsonl": "no samples",
    "golden/report.json": "no accuracy on --golden_data",
}
COMMAND = b"command: "
SAMPLE_FIELDS = {"step": int, "prompt": str, "response": str, "length": int, "ended": bool}


class Run(NamedTuple):
    """The output folder of a training step. Missing files give empty fields."""

    folder: Path
    title: str
    stage: str  # sft, reward, direct, ppo; empty if unknown
    lines: list[Line]  # metrics.jsonl, by step; values are floats, or None if they were not finite
    options: dict[str, Any]
    known: Known
    samples: list[Line]
    golden: dict[str, Any]
    problems: list[str]  # sentences: missing files, skipped lines and values
    given: set[str] | None = None  # options on the command lines in train.log; None without any

    @property
    def valid_options(self) -> dict[str, Any]:
        """Options whose type matches the declaration; options.json may be damaged."""
        return {
            name: value
            for name, value in self.options.items()
            if name in self.known and type(value) is type(self.known[name][0])
        }


def read_run(folder: Path, stage: Stage | None, options: dict[str, Any], problems: list[str]) -> Run:
    """Read a run; options.json has been read already. Raises OSError."""
    is_ppo = stage is not None and stage.name == "ppo"
    expected = ["metrics.jsonl", "options.json", *["samples.jsonl"] * is_ppo]
    expected += ["golden/report.json"] * bool(options.get("golden_data"))
    missing = [f"{name} is missing: {USES[name]}." for name in expected if not (folder / name).exists()]
    lines, metrics_problems = read_metrics(folder / "metrics.jsonl")
    samples, samples_problems = [], []
    if stage is None or is_ppo:
        samples, samples_problems = read_samples(folder / "samples.jsonl")
    golden, golden_problems = read_json(folder / "golden/report.json")
    return Run(
        folder=folder,
        title=stage.title if stage else "Run",
        stage=stage.name if stage else "",
        lines=lines,
        options=options,
        known=stage.known if stage else {},
        samples=samples,
        golden=golden,
        problems=[*missing, *problems, *metrics_problems, *samples_problems, *golden_problems],
        given=given_options(folder / "train.log"),
    )


def columns(lines: Sequence[Line], *names: str) -> list[list[float]]:
    """Values of each metric, from the lines that hold all of them as finite numbers."""
    rows = [[line.get(name) for name in names] for line in lines]
    complete = [row for row in rows if all(value is not None and math.isfinite(value) for value in row)]
    return [[row[i] for row in complete] for i in range(len(names))]


def read_samples(path: Path) -> tuple[list[Line], list[str]]:
    """Held-out responses with their steps, and sentences about skipped lines."""
    records, damaged = read_lines(path)
    samples, other = [], []
    for number, record in records:
        if all(isinstance(record.get(name), kind) for name, kind in SAMPLE_FIELDS.items()):
            samples.append({name: value for name, value in record.items() if _is_shown(name, value)})
        else:
            other.append(number)
    problems = skipped_message(path, damaged, "without a JSON object")
    return samples, problems + skipped_message(path, other, "without the fields of a sample")


def given_options(log: Path) -> set[str] | None:
    """Names of the options on all command lines in train.log, one line per start of the run."""
    try:
        lines = [line for line in log.read_bytes().split(b"\n") if line.startswith(COMMAND)]
        words = [
            word for line in lines for word in shlex.split(line[len(COMMAND) :].decode(errors="replace"))
        ]
    except (OSError, ValueError):
        return None
    names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    names |= {name.removeprefix("no_") for name in names}
    return names if lines else None


def read_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The object in a JSON file, empty without a file; and a sentence if it cannot be read."""
    if not path.is_file():
        return {}, []
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError(f"must be a JSON object, not {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{path}: skipped: {reason(error)}."]
    return content, []


def _is_shown(name: str, value: Any) -> bool:
    return name in SAMPLE_FIELDS or (name in ("score", "gold") and is_number(value))

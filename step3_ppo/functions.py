"""Scores by functions that the user writes."""

import importlib.util
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.distributed import gather_objects, log
from common.options import UserError

PATIENCE = 30.0  # seconds after which a function that has not returned is named in the log
SHOWN = 200  # characters of a record in messages


class RewardFunction(NamedTuple):
    """A function of lists of prompts, responses and records, to one number for each, and its weight."""

    name: str
    call: Callable[..., Sequence[float]]
    weight: float
    option: str  # that named it


def load_functions(sources: Sequence[str], option: str) -> list[RewardFunction]:
    """Functions named as FILE.py:NAME or FILE.py:NAME:WEIGHT.

    A function is called as `name(prompts=..., responses=..., records=...)`, three lists of equal length: what
    the records hold as prompts (strings or lists of messages), texts, and the records themselves. Raises
    UserError when there is no such file or function, when the file fails, for a weight that is no number, and
    when two have one name.
    """
    functions = [_load(source, option) for source in sources]
    names = [function.name for function in functions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--{option}: {twice[0]} is given twice; each needs a name of its own")
    return functions


def function_scores(
    functions: Sequence[RewardFunction], prompts: Sequence[Any], responses: Sequence[str],
    records: Sequence[dict[str, Any]],
) -> list[list[float]]:  # fmt: skip
    """What each of F functions says of this rank's b responses, (F, b). Every rank must call it.

    Raises UserError, on all ranks, naming the function and the record: when it fails, gives another number of
    scores, or one that is not a finite number.
    """
    scores, problem = [], ""
    try:
        for function in functions:
            scores.append(_call(function, prompts, responses, records))
    except UserError as error:
        problem = str(error)
    if problems := list(filter(None, gather_objects(problem))):
        raise UserError(problems[0])
    return scores


def _load(source: str, option: str) -> RewardFunction:
    found = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)(?::(-?\d*\.?\d+))?", source)
    if found is None:
        raise UserError(f"--{option} {source}: must be FILE.py:NAME or FILE.py:NAME:WEIGHT")
    path, name = Path(found[1]), found[2]
    if not path.is_file():
        raise UserError(f"--{option} {source}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - the user's own code
        raise UserError(f"--{option} {path}: {type(error).__name__}: {error}") from error
    call = getattr(module, name, None)
    if not callable(call):
        raise UserError(f"--{option} {source}: {path} has no function {name}")
    return RewardFunction(name, call, float(found[3] or 1.0), option)


def _call(
    function: RewardFunction, prompts: Sequence[Any], responses: Sequence[str],
    records: Sequence[dict[str, Any]],
) -> list[float]:  # fmt: skip
    if not responses:
        return []
    said = f"--{function.option} {function.name}"
    still = threading.Timer(PATIENCE, log, (f"{said}: has not returned after {PATIENCE:.0f} s; waiting",))
    still.daemon = True
    still.start()
    try:
        found = function.call(prompts=list(prompts), responses=list(responses), records=list(records))
    except Exception as error:  # noqa: BLE001 - the user's own code
        culprit = _culprit(function, type(error), prompts, responses, records)
        where = f"record {_show(records[culprit])}"
        raise UserError(f"{said}: {type(error).__name__}: {error}; {where}") from error
    finally:
        still.cancel()
    try:
        scores = [float(score) for score in found]
    except (TypeError, ValueError):
        raise UserError(f"{said}: must return a list of numbers, not {_show(found)}") from None
    if len(scores) != len(responses):
        raise UserError(f"{said}: returned {len(scores)} scores for {len(responses)} responses")
    for score, record in zip(scores, records, strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"{said}: returned {score} for record {_show(record)}; it must be a finite number"
            )
    return scores


def _culprit(
    function: RewardFunction, failure: type[Exception], prompts: Sequence[Any], responses: Sequence[str],
    records: Sequence[dict[str, Any]],
) -> int:  # fmt: skip
    """The first record on which the function fails alike by itself; the first of all if there is none."""
    for row in range(len(records)):
        try:
            function.call(prompts=[prompts[row]], responses=[responses[row]], records=[records[row]])
        except failure:  # noqa: PERF203 - at most once
            return row
    return 0


def _show(value: Any) -> str:
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."

"""Scores by functions that the user writes."""

import contextlib
import importlib.util
import json
import math
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.runtime.distributed import gather_objects, rank
from common.runtime.options import UserError
from common.runtime.process import Stopped

PATIENCE = 30.0  # seconds after which a function that has not returned is named; then whenever they double
SHOWN = 200  # characters of a record or a value in messages
Given = dict[str, Sequence[Any]]  # prompts, responses, records


class FunctionError(UserError):
    """A function failed on some rank; all ranks raise it together."""


class RewardFunction(NamedTuple):
    """A function of lists of prompts, responses and records, to one number for each, and its weight."""

    name: str
    call: Callable[..., Sequence[float]]
    weight: float
    title: str  # in messages: the option that named it, and its name


def load_functions(sources: Sequence[str], option: str) -> list[RewardFunction]:
    """Functions named as FILE.py:NAME or FILE.py:NAME:WEIGHT.

    A function is called as `name(prompts=..., responses=..., records=...)`, three lists of equal length: what
    the records hold as prompts (strings or lists of messages), texts, and the records themselves. Raises
    UserError when there is no such file or function, when the file fails, and for a bad weight or name.
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

    Raises FunctionError, on all ranks, naming the function and the record: when it fails, gives another
    number of scores, or one that is not a finite number.
    """
    given = {"prompts": prompts, "responses": responses, "records": records}
    scores, problem = [], ""
    try:
        for function in functions:
            scores.append(_call(function, given))
    except UserError as error:
        problem = str(error)
    if problems := list(filter(None, gather_objects(problem))):
        raise FunctionError(problems[0])
    return scores


def _load(source: str, option: str) -> RewardFunction:
    found = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)(?::(.+))?", source)
    if found is None:
        raise UserError(f"--{option} {source}: must be FILE.py:NAME or FILE.py:NAME:WEIGHT")
    path, name, weight = Path(found[1]), found[2], found[3] or "1"
    if not math.isfinite(_number(weight)):
        raise UserError(f"--{option} {source}: the weight must be a finite number, not {weight!r}")
    if not path.is_file():
        raise UserError(f"--{option} {source}: there is no file {path}")
    try:
        call = getattr(_module(path.resolve()), name, None)
    except Stopped:
        raise
    except BaseException as error:  # noqa: BLE001 - the user's own code, which may even exit
        raise UserError(f"--{option} {path}: {_line(error)}") from error
    if not callable(call):
        raise UserError(f"--{option} {source}: {path} has no function {name}")
    return RewardFunction(name, call, float(weight), f"--{option} {name}")


def _module(path: Path) -> Any:
    """The file as a module, once; what lies beside it can be imported, but hides nothing of others."""
    name = str(path)  # not its stem, which another module may have
    if name in sys.modules:
        return sys.modules[name]
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _call(function: RewardFunction, given: Given) -> list[float]:
    """Its scores (b,) of b responses. Raises UserError."""
    count, is_done = len(given["responses"]), threading.Event()
    what = f"{function.title} on rank {rank()}, given {count} responses"
    threading.Thread(target=_watch, args=(what, is_done), daemon=True).start()
    try:
        return _ask(function, given) if count else []
    except (UserError, Stopped):
        raise
    except BaseException as error:  # noqa: BLE001 - the user's own code, which may even exit
        raise UserError(f"{function.title}: {_line(error)}; {_culprit(function, given, error)}") from error
    finally:
        is_done.set()


def _ask(function: RewardFunction, given: Given) -> list[float]:
    """Raises what the function raises, and UserError for what is not a list of so many finite numbers."""
    found = function.call(**{name: list(values) for name, values in given.items()})
    is_one = not hasattr(found, "__iter__") or getattr(found, "ndim", 1) == 0
    if is_one or isinstance(found, str | bytes | dict | set):
        raise UserError(f"{function.title}: must return a list of numbers, not {_show(found)}")
    values, records = list(found), given["records"]  # a generator runs only here
    if len(values) != len(records):
        raise UserError(f"{function.title}: returned {len(values)} scores for {len(records)} responses")
    for value, record in zip(values, records, strict=True):
        if isinstance(value, str | bytes) or not math.isfinite(_number(value)):
            said = f"{function.title}: returned {_show(value)} for record {_show(record)}"
            raise UserError(f"{said}; it must be a finite number")
    return [float(value) for value in values]


def _culprit(function: RewardFunction, given: Given, failure: BaseException) -> str:
    """The first record on which the function fails alike by itself, in words."""
    for row, record in enumerate(given["records"]):
        try:
            _ask(function, {name: [values[row]] for name, values in given.items()})
        except Stopped:
            raise
        except BaseException as error:  # noqa: BLE001 - also what it raises only because there is one record
            if type(error) is type(failure):
                return f"record {_show(record)}"
    return f"no single record makes it do so, of {len(given['records'])} at once"


def _watch(what: str, is_done: threading.Event) -> None:
    """Say, on this rank, what has not returned after PATIENCE seconds, and whenever that time has doubled."""
    until = PATIENCE
    while not is_done.wait(max(PATIENCE, until / 2)):
        with contextlib.suppress(OSError):
            print(f"{what}: has not returned after {until:g} s; waiting", flush=True)
        until *= 2


def _number(value: Any) -> float:
    """A value as a float; not a number when it is none, for whatever reason."""
    try:
        return float(value)
    except Exception:  # noqa: BLE001 - arrays and tensors raise more than float does
        return math.nan


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def _show(value: Any) -> str:
    text = json.dumps(value, default=repr, ensure_ascii=False) if isinstance(value, dict) else repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."

"""User-defined reward functions: loading, calling, error reports."""

import contextlib
import importlib.util
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.runtime.distributed import gather_objects, rank
from common.runtime.files import is_file
from common.runtime.options import UserError
from common.runtime.process import Stopped
from step3_ppo.errors import FunctionError

PATIENCE = 30.0  # seconds after which a function that has not returned is reported; then at 2, 4, ... times
LARGEST_SCORE = torch.finfo(torch.float32).max
SHOWN = 200  # characters of a record or a value in messages
Inputs = dict[str, Sequence[Any]]  # prompts, responses, records


class RewardFunction(NamedTuple):
    """A function from lists of prompts, responses and records to one number each, and its weight."""

    name: str
    call: Callable[..., Sequence[float]]
    weight: float
    title: str  # in messages: option and name


@contextlib.contextmanager
def _without_exit() -> Iterator[None]:
    """Inside, `os._exit` in this process is an error: the run would end without a reason."""
    process, exit_now = os.getpid(), os._exit

    def refuse(code: int) -> None:
        if os.getpid() != process:  # a child of the function
            exit_now(code)
        raise SystemExit(code)

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = exit_now


def load_functions(sources: Sequence[str], option: str) -> list[RewardFunction]:
    """Load functions given as FILE.py:NAME or FILE.py:NAME:WEIGHT.

    A function is called as `name(prompts=..., responses=..., records=...)` with three lists of equal length:
    prompts as in the records (strings or lists of messages), response texts, and records. Raises UserError
    for a missing file or function, a file that fails, and a bad weight or name.
    """
    functions = [_load(source, option) for source in sources]
    names = [function.name for function in functions]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--{option}: {repeated[0]} is given twice; names must differ")
    return functions


def function_scores(
    functions: Sequence[RewardFunction], prompts: Sequence[Any], responses: Sequence[str],
    records: Sequence[dict[str, Any]],
) -> list[list[float]]:  # fmt: skip
    """Scores (F, b) of this rank's b responses by F functions. Every rank must call it.

    Raises FunctionError on all ranks, with the function and the record, when a function fails, returns
    another number of scores, or a score that is not a finite number.
    """
    inputs = {"prompts": prompts, "responses": responses, "records": records}
    scores, problem = [], ""
    try:
        for function in functions:
            scores.append(_call(function, inputs))
    except UserError as error:
        problem = str(error)
    if problems := list(filter(None, gather_objects(problem))):
        raise FunctionError(problems[0])
    return scores


def _load(source: str, option: str) -> RewardFunction:
    match = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)(?::(.+))?", source)
    if match is None:
        raise UserError(f"--{option} {source}: must be FILE.py:NAME or FILE.py:NAME:WEIGHT")
    path, name, weight = Path(match[1]), match[2], match[3] or "1"
    if not math.isfinite(_number(weight)):
        raise UserError(f"--{option} {source}: the weight must be a finite number, not {weight!r}")
    if not is_file(path):
        raise UserError(f"--{option} {source}: there is no file {path}")
    try:
        call = getattr(_module(path.resolve()), name, None)
    except Stopped:
        raise
    except BaseException as error:  # the user's own code, which may even exit
        raise UserError(f"--{option} {path}: {_line(error)}") from error
    if not callable(call):
        raise UserError(f"--{option} {source}: {path} has no function {name}")
    return RewardFunction(name, call, float(weight), f"--{option} {name}")


@_without_exit()
def _module(path: Path) -> Any:
    """Import the file once. Modules beside it can be imported, but do not shadow others."""
    name = str(path)  # unique, unlike its stem
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


def _call(function: RewardFunction, inputs: Inputs) -> list[float]:
    """Scores (b,) of b responses. Raises UserError."""
    count, is_done = len(inputs["responses"]), threading.Event()
    title = f"{function.title} on rank {rank()}, given {count} responses"
    threading.Thread(target=_watch, args=(title, is_done), daemon=True).start()
    try:
        return _call_and_check(function, inputs) if count else []
    except (UserError, Stopped):
        raise
    except BaseException as error:  # the user's own code, which may even exit
        raise UserError(f"{function.title}: {_line(error)}; {_culprit(function, inputs, error)}") from error
    finally:
        is_done.set()


@_without_exit()
def _call_and_check(function: RewardFunction, inputs: Inputs) -> list[float]:
    """Raises the function's own errors, and UserError unless it returns one finite number per record."""
    result = function.call(**{name: list(values) for name, values in inputs.items()})
    is_scalar = not hasattr(result, "__iter__") or getattr(result, "ndim", 1) == 0
    if is_scalar or isinstance(result, str | bytes | dict | set):
        raise UserError(f"{function.title}: must return a list of numbers, not {_show(result)}")
    values, records = list(result), inputs["records"]  # a generator runs only here
    if len(values) != len(records):
        raise UserError(f"{function.title}: returned {len(values)} scores for {len(records)} responses")
    for value, record in zip(values, records, strict=True):
        if isinstance(value, str | bytes) or not abs(_number(value)) <= LARGEST_SCORE:
            raise UserError(
                f"{function.title}: returned {_show(value)} for record {_show(record)};"
                " it must be a finite number in single precision"
            )
    return [float(value) for value in values]


def _culprit(function: RewardFunction, inputs: Inputs, failure: BaseException) -> str:
    """The first record for which the function raises the same error when called with that record only."""
    for row, record in enumerate(inputs["records"]):
        try:
            _call_and_check(function, {name: [values[row]] for name, values in inputs.items()})
        except Stopped:
            raise
        except BaseException as error:  # noqa: BLE001 - also errors due to a list of one record
            if type(error) is type(failure):
                return f"record {_show(record)}"
    return f"no single record of the {len(inputs['records'])} causes it"


def _watch(title: str, is_done: threading.Event) -> None:
    """Report, on this rank, a function that has not returned after PATIENCE seconds, and each time it
    doubles.
    """
    elapsed = PATIENCE
    while not is_done.wait(max(PATIENCE, elapsed / 2)):
        with contextlib.suppress(OSError):
            print(f"{title}: has not returned after {elapsed:g} s; waiting", flush=True)
        elapsed *= 2


def _number(value: Any) -> float:
    """A value as a float; NaN when it cannot be converted."""
    try:
        return float(value)
    except Exception:  # noqa: BLE001 - arrays and tensors raise more than float does
        return math.nan


def _line(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - the user's own class
        text = ""
    return " ".join(f"{type(error).__name__}: {text}".split()).removesuffix(":")


def _show(value: Any) -> str:
    text = json.dumps(value, default=repr, ensure_ascii=False) if isinstance(value, dict) else repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."

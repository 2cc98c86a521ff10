"""Command-line parser: options of a dataclass, their checks and --help. Imports no library."""

import argparse
import dataclasses
import difflib
import math
import os
import re
import shutil
import textwrap
import typing
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

from common.runtime.options import UserError

Options = TypeVar("Options")
LARGEST = {int: 2**32 - 1, float: 1e30}  # seeds have up to 32 bits; libraries hold little more
METAVARS = {int: "N", float: "X", str: "TEXT"}
VARIABLES = "Variables such as NUM_GPUS, ZERO_CONFIG and HOSTFILE are described in launch/README.md."
TEXT_METAVARS = {
    "from_checkpoint": "latest|none|PATH",
    "model_name_or_path": "MODEL", "_model": "MODEL", "_data": "FILE", "_config": "FILE", "_template": "FILE",
    "_function": "FILE.py:NAME", "_dir": "DIR", "input": "FILE", "output": "FILE",
}  # fmt: skip
_given: frozenset[str] = frozenset()  # names of the options on the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub(r"^(--\w+)[^:]*:", r"\1:", message.removeprefix("argument ")))


class _OldName(argparse.Action):
    """Sets the options that have taken the place of an older one; the log of a run names them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ARG002
        for name in self.const:
            setattr(namespace, name, values)
        if os.environ.get("RANK") == "0":  # not in the check before a run
            print(f"{option_string} is an old name: it sets --{' and --'.join(self.const)}", flush=True)


def parse_options(
    options_class: type[Options], argv: list[str] | None = None, usage: str = "",
    check_required: bool = True,
) -> Options:  # fmt: skip
    """Parse and check the command line.

    Options that depend on each other are checked by the `check` method of the dataclass, if it has one.
    usage: the first line of --help. Raises UserError for an unknown option, a value of the wrong type or
    outside its limits, a missing required option and contradicting options.
    """
    global _given
    parser = _make_parser(options_class, usage)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}{_suggestion(unknown[0], options_class)}")
    options = options_class(**vars(parsed))
    for field in dataclasses.fields(options):
        _check_limits(field.name, getattr(options, field.name), field.metadata["limits"])
        if check_required and field.metadata["required"] and not getattr(options, field.name):
            raise UserError(f"--{field.name} is required")
    one_of = getattr(options, "one_of", ())
    if check_required and one_of and not any(getattr(options, name) for name in one_of):
        raise UserError(f"{_either(one_of)} is required")
    if hasattr(options, "check"):
        options.check()
    _given = frozenset(vars(parsed))
    return options


def given_options() -> frozenset[str]:
    """Names of the options on the command line, from the last call of `parse_options`."""
    return _given


def _make_parser(options_class: type, usage: str) -> _Parser:
    """Build the parser: required options first, then a group for each class that declares options.

    Groups that all commands share come last.
    """
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    one_of = getattr(options_class, "one_of", ())
    required = [field for field in fields.values() if field.metadata["required"]]
    required += [fields[name] for name in one_of]
    parser = _Parser(
        usage=usage or "[options]", description=options_class.__doc__, epilog=VARIABLES, allow_abbrev=False,
        add_help=False, argument_default=argparse.SUPPRESS, formatter_class=_HelpFormatter,
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    groups: dict[str, list[dataclasses.Field]] = {"Required": required}
    title_of = {field.name: "Required" for field in required}
    shared = []
    for owner in options_class.__mro__:
        summary = (owner.__doc__ or "").partition(".")[0]
        shared += [summary] * (owner.__module__ == UserError.__module__)
        title = "Options of this command" if owner is options_class else summary
        groups.setdefault(title, [])
        for name in owner.__dict__.get("__annotations__", {}):
            if name in fields and title_of.get(name) != "Required":
                title_of[name] = title  # the last class in this order declares the option first
    for name, title in title_of.items():
        groups[title] += [fields[name]] * (title != "Required")
    for old_name, names in _old_names(options_class).items():
        kind = fields[names[0]].type
        settings = {"action": _OldName, "const": names, "type": kind, "help": argparse.SUPPRESS}
        _add_names(parser, old_name, settings)
    for title in sorted(groups, key=shared.__contains__):
        note = f"{_either(one_of)} is required." if one_of and title == "Required" else None
        group = parser.add_argument_group(title, note)
        for field in groups[title]:
            _add(group, field)
    return parser


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(f"--{name}" for name in names)


def _old_names(options_class: type) -> dict[str, list[str]]:
    """Older names of options, each with the options that it sets now."""
    names: dict[str, list[str]] = {}
    for field in dataclasses.fields(options_class):
        if field.metadata["formerly"]:
            names.setdefault(field.metadata["formerly"], []).append(field.name)
    return names


def _add(group: Any, field: dataclasses.Field) -> None:
    """Add an option with underscores and, hidden from --help, with dashes in its name."""
    kind = _kind(field)
    settings: dict[str, Any] = {"help": _help(field), "metavar": _metavar(field), "type": kind}
    if kind is bool:
        settings |= {"type": _to_bool, "nargs": "?", "const": True}
    elif typing.get_origin(kind) is Literal:
        settings |= {"type": str, "choices": typing.get_args(kind)}
        if switch := field.metadata["switch"]:
            settings |= {"type": partial(_to_choice, switch), "nargs": "?", "const": switch[True]}
    if kind is not field.type:
        settings["nargs"] = "+"
    _add_names(group, field.name, settings)
    if field.type is bool and field.default:
        off = {"help": argparse.SUPPRESS, "action": "store_false", "dest": field.name}
        _add_names(group, f"no_{field.name}", off)


def _add_names(group: Any, name: str, settings: dict[str, Any]) -> None:
    group.add_argument(f"--{name}", **settings)
    if "_" in name:
        hidden = settings | {"help": argparse.SUPPRESS, "dest": settings.get("dest", name)}
        group.add_argument(f"--{name.replace('_', '-')}", **hidden)


def _kind(field: dataclasses.Field) -> Any:
    """Type of an option's value; of each of its values for a list."""
    return typing.get_args(field.type)[0] if typing.get_origin(field.type) is list else field.type


def _metavar(field: dataclasses.Field) -> str:
    kind = _kind(field)
    if kind is bool:
        return "true|false"
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    matching = (metavar for ending, metavar in TEXT_METAVARS.items() if field.name.endswith(ending))
    return next(matching, METAVARS[kind]) if kind is str else METAVARS[kind]


def _help(field: dataclasses.Field) -> str:
    """Help text of an option, with its default and limits."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    shown = str(default).lower() if isinstance(default, bool) else default
    shown = " ".join(default) if isinstance(default, list) else shown
    facts = [f"default {shown}"] * (default not in ("", []))
    facts += [f"{kind.replace('_', ' ')} {limit:g}" for kind, limit in field.metadata["limits"].items()]
    facts += [f"turn off with --no_{field.name}"] * (default is True)
    text = field.metadata["help"] + (f" ({'; '.join(facts)})" if facts else "")
    return text.replace("%", "%%")


class _HelpFormatter(argparse.HelpFormatter):
    """Prints each option on its own line, with its help text indented below."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=8, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph.strip(), width)]

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar} [{action.metavar} ...]"
        return str(action.metavar) if action.nargs == "?" else super()._format_args(action, default_metavar)


def _to_bool(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")


def _to_choice(switch: tuple[str, str], text: str) -> str:
    """A choice as it is; for false and true, the choice that stands for it."""
    try:
        return switch[_to_bool(text)]
    except argparse.ArgumentTypeError:
        return text


def _suggestion(unknown: str, options_class: type) -> str:
    name = unknown.lstrip("-").replace("-", "_")
    names = [field.name for field in dataclasses.fields(options_class)]
    near = difflib.get_close_matches(name, names, n=1) or [long for long in names if name and name in long]
    return f"; did you mean --{near[0]}?" if near else "; --help lists all options"


def _check_limits(name: str, value: Any, limits: dict[str, float]) -> None:
    for kind, limit in limits.items():
        allowed = {"at_least": value >= limit, "above": value > limit, "at_most": value <= limit}[kind]
        if not allowed:
            raise UserError(f"--{name} {value}: must be {kind.replace('_', ' ')} {limit:g}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} {value}: must be a finite number")
    if type(value) in LARGEST and abs(value) > LARGEST[type(value)]:
        raise UserError(f"--{name} {value}: must be at most {LARGEST[type(value)]}")

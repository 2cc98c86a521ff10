"""Checks of options that depend on each other, and of options changed since a run started."""

import dataclasses
import json
from typing import Any

from common.runtime.option_parser import given_options
from common.runtime.options import OptimiserOptions, Resume, UserError
from common.runtime.row_groups import data_ranks


def check_held_out(options: Any) -> None:
    """Raise UserError for --best_metric without held-out data."""
    if options.best_metric != "none" and not options.eval_data and not options.eval_fraction:
        raise UserError(
            f"--best_metric {options.best_metric}: needs held-out data: --eval_data, or an --eval_fraction"
            " above 0"
        )


def check_needs(options: Any, needs: dict[str, str]) -> None:
    """Raise UserError for an option that lacks the one that it needs; see `without_needed`."""
    for message in without_needed(options, needs):
        raise UserError(message)


def without_needed(options: Any, needs: dict[str, str]) -> list[str]:
    """A message for each option that differs from its default while the one that it needs is not set.

    needs: names of options, each with that of the option without which it has no effect.
    """
    defaults = default_values(options)
    values = {name: getattr(options, name) for name in needs}
    return [
        f"--{name} {_in_words(value)}: has no effect without --{needs[name]}"
        for name, value in values.items()
        if value != defaults[name] and not getattr(options, needs[name])
    ]


def same_command(options: Any) -> str:
    """Start of a sentence: how to resume a stopped run."""
    is_latest = options.resume_from_checkpoint == "latest"
    return f"Run the same command{'' if is_latest else ' with --resume_from_checkpoint latest'}"


def resolved(options: Any) -> dict[str, Any]:
    """All options as JSON values; `given` lists the options on the command line."""
    names = {field.name for field in dataclasses.fields(options)}
    return json.loads(json.dumps(dataclasses.asdict(options))) | {"given": sorted(given_options() & names)}


def resume_kinds(options: Any) -> dict[str, Resume]:
    """For each option, whether it may change when a run is resumed (see `Resume`)."""
    return {field.name: field.metadata["resume"] for field in dataclasses.fields(options)}


def free_to_change(options: Any) -> set[str]:
    """Options that may change when a run is resumed."""
    return {name for name, kind in resume_kinds(options).items() if kind not in ("same", "function")}


def with_new_names(earlier: dict[str, Any], options: Any) -> dict[str, Any]:
    """Options of an earlier run, as from `resolved`, with the names and values that they have now."""
    given, renamed = set(earlier.get("given", earlier)), dict(earlier)
    for field in dataclasses.fields(options):
        old_name = field.metadata["formerly"]
        if old_name in earlier and field.name not in earlier:
            renamed[field.name] = earlier[old_name]
            renamed.pop(old_name, None)
            given |= {field.name} if old_name in given else set()
        if field.metadata["switch"] and isinstance(earlier.get(field.name), bool):
            renamed[field.name] = field.metadata["switch"][earlier[field.name]]
    return renamed | ({"given": sorted(given & renamed.keys())} if "given" in earlier else {})


def default_values(options: Any) -> dict[str, Any]:
    """Default values of all options."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(options)
    }


def changed_options(
    earlier: dict[str, Any], current: dict[str, Any], defaults: dict[str, Any], free: set[str]
) -> list[str]:
    """List options that differ between two runs and were on the command line of at least one.

    earlier, current: results of `resolved`; without `given`, as in old versions, all options count as given.
    Options set by another option (--loss sets --beta) count only if given. free: options that may differ.
    """
    given = {*earlier.get("given", earlier), *current["given"]} - free
    changes = []
    for option in sorted(given & (earlier.keys() | current.keys())):
        before = earlier.get(option, defaults.get(option))
        now = current.get(option, "(no such option)")
        if before != now:
            changes.append(f"--{option} {_in_words(before)} -> {_in_words(now)}")
    return changes


def changed_defaults(earlier: dict[str, Any], current: dict[str, Any], free: set[str]) -> list[str]:
    """List options, with earlier values, whose default has changed between two versions."""
    names = sorted((earlier.keys() & current.keys()) - free - {"given"})
    return [f"--{name} {_in_words(earlier[name])}" for name in names if earlier[name] != current[name]]


def _in_words(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    return "(empty)" if value == "" else str(value).lower() if isinstance(value, bool) else str(value)


def rows_per_micro_batch(options: OptimiserOptions) -> int:
    """The largest number up to --micro_batch_size that divides a rank's part of a global batch."""
    share = options.global_batch_size // data_ranks()
    largest = min(options.micro_batch_size, share)
    return next(size for size in range(largest, 0, -1) if share % size == 0)

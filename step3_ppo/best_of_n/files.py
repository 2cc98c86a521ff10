"""samples.jsonl, and the demonstrations and preferences that are selected from it."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, assert_never

import numpy as np

from common.runtime.files import flush_folder, write_json
from common.runtime.options import UserError
from step3_ppo.best_of_n.options import BestOfNOptions
from step3_ppo.best_of_n.report import advise, describe_unused
from step3_ppo.best_of_n.select import CUT, EMPTY, REPEATED, USABLE, at_least, best, sort_out, worse

PAIR_STREAM = 4  # apart from the random numbers that order data and draw responses
DEMONSTRATION = ("prompt", "completion", "ended", "score")  # fields of a sample
Sample = dict[str, Any]


def whole_samples(path: Path, chunk: int, total: int) -> int:
    """Cut the file after its last whole chunk of so many lines; returns the number of lines that are left.

    Of `total` lines the last chunk may have fewer. Raises UserError for a line that holds no sample.
    """
    position = done = end = 0
    with path.open("a+b") as file:
        file.seek(0)
        for number, line in enumerate(file, start=1):
            position += len(line)
            if line.endswith(b"\n"):
                _check_sample(line, f"{path}:{number}")
                if number % chunk == 0 or number == total:
                    done, end = number, position
        file.truncate(end)
    return done


def _check_sample(line: bytes, origin: str) -> None:
    try:
        sample = json.loads(line)
        is_whole = isinstance(sample["completion"], str) and isinstance(sample["ended"], bool)
        is_whole = is_whole and "prompt" in sample and math.isfinite(sample["score"] + sample["length"])
    except (ValueError, TypeError, KeyError, RecursionError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{origin}: not a sample of this command; restore the line, or delete the file")


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Append to the file, and return when the disk holds it."""
    with path.open("ab") as file:
        file.writelines(_line(sample) for sample in samples)
        file.flush()
        os.fsync(file.fileno())


def select(options: BestOfNOptions) -> dict[str, Any]:
    """Write demonstrations.jsonl, preferences.jsonl and report.json from samples.jsonl; returns the report.

    Raises UserError when nothing is kept.
    """
    size = options.samples_per_prompt
    samples = Path(options.output_dir) / "samples.jsonl"
    folder = Path(options.selection_dir or options.output_dir)
    columns: dict[str, list[list[Any]]] = {name: [] for name in ("score", "ended", "length", "verdict")}
    distinct = 0
    for group in _groups(samples, size):
        for name in ("score", "ended", "length"):
            columns[name].append([sample[name] for sample in group])
        texts = [sample["completion"] for sample in group]
        columns["verdict"].append(sort_out(texts, columns["ended"][-1], options.keep_truncated))
        distinct += len(set(texts))
    scores, ended, lengths, verdicts = (np.array(column) for column in columns.values())  # (P, n) each
    usable = verdicts == USABLE
    unused = {name: int((verdicts == name).sum()) for name in (CUT, EMPTY, REPEATED)}

    kept, threshold = _keep(scores, usable, unused, options)
    top = best(scores, usable)
    lower = worse(scores, usable, options.pairs, (options.seed, PAIR_STREAM, options.round))
    with _whole(folder / "demonstrations.jsonl") as one, _whole(folder / "preferences.jsonl") as two:
        for place, group in enumerate(_groups(samples, size)):
            for number in np.flatnonzero(kept[place]):
                one.write(_line({name: group[number][name] for name in DEMONSTRATION}))
            if lower[place].any():
                chosen, rejected = (group[mask[place].argmax()] for mask in (top, lower))
                two.write(_line(_preference(chosen, rejected)))

    report = {
        "prompts": len(scores),
        "samples": scores.size,
        "response_tokens": int(lengths.sum()),
        "score": {"mean": scores.mean(), "std": scores.std(), "best": scores[top].mean()},
        "ended": ended.mean(),
        "max_response_length": options.max_response_length,
        "distinct": distinct / scores.size,
        "unused": unused,
        "threshold": threshold,
        "demonstrations": int(kept.sum()),
        "prompts_with_demonstrations": int(kept.any(1).sum()),
        "score_of_demonstrations": scores[kept].mean(),
        "preferences": int(lower.sum()),
        "selection": {k: v for k, v in asdict(options.selection).items() if k != "selection_dir"},
    }
    write_json(folder / "report.json", report)
    return report


def _keep(
    scores: np.ndarray, usable: np.ndarray, unused: dict[str, int], options: BestOfNOptions
) -> tuple[np.ndarray, float | None]:
    """The demonstrations (P, n) bool, and the threshold if there is one. Raises UserError for none."""
    if not usable.any():
        raise UserError(
            f"{options.output_dir}/samples.jsonl: nothing to keep of {usable.size} responses;"
            f" {describe_unused(unused, options.max_response_length)}{advise(unused, usable.size)}"
        )
    match options.keep:
        case "best":
            return best(scores, usable), None
        case "threshold":
            threshold = options.threshold
        case "quantile":
            threshold = float(np.quantile(scores[usable], options.quantile))
        case _:
            assert_never(options.keep)
    kept = at_least(scores, usable, threshold)
    if not kept.any():
        median, highest = np.quantile(scores[usable], (0.5, 1))
        raise UserError(
            f"--threshold {threshold:g}: no response scores as much: of the usable ones the median is"
            f" {median:.3f}, the best has {highest:.3f}"
        )
    return kept, threshold


def _preference(chosen: Sample, rejected: Sample) -> dict[str, Any]:
    margin = round(chosen["score"] - rejected["score"], 6)
    texts = {"chosen": chosen["completion"], "rejected": rejected["completion"]}
    ends = {"chosen_ended": chosen["ended"], "rejected_ended": rejected["ended"]}
    return {"prompt": chosen["prompt"], **texts, **ends, "margin": margin}


def _groups(path: Path, size: int) -> Iterator[list[Sample]]:
    """The samples, those to one prompt together."""
    with path.open("rb") as lines:
        yield from iter(lambda: [json.loads(line) for line in islice(lines, size)], [])


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place at the end of the `with` block, when the disk holds it."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    flush_folder(path.parent)


def _line(record: dict[str, Any]) -> bytes:
    return f"{json.dumps(record)}\n".encode()

"""samples.jsonl, and the demonstrations and preferences selected from it."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, assert_never

import numpy as np

from common.data.journal import to_lines
from common.runtime.files import replacing, write_json
from common.runtime.options import UserError
from step3_ppo.best_of_n.options import BestOfNOptions
from step3_ppo.best_of_n.report import advise, describe_unused
from step3_ppo.best_of_n.select import CUT, EMPTY, REPEATED, USABLE, above, best, classify, rejected

PAIR_STREAM = 4  # random stream of pairs, separate from those of data order and sampling
DEMONSTRATION = ("prompt", "completion", "ended", "score")  # fields of a sample
Sample = dict[str, Any]


def truncate_to_chunks(path: Path, chunk: int, total: int) -> int:
    """Truncate the file after its last complete chunk of `chunk` lines; returns the number of lines left.

    The last chunk of `total` lines may be shorter. Raises UserError for a line without a sample.
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
        is_valid = isinstance(sample["completion"], str) and isinstance(sample["ended"], bool)
        is_valid = is_valid and "prompt" in sample and math.isfinite(sample["score"] + sample["length"])
    except Exception:  # noqa: BLE001 - the line may hold anything
        is_valid = False
    if not is_valid:
        raise UserError(f"{origin}: not a sample of this command; restore the line, or delete the file")


def select(options: BestOfNOptions) -> dict[str, Any]:
    """Write demonstrations.jsonl, preferences.jsonl and report.json from samples.jsonl; returns the report.

    Raises UserError when no demonstration is left.
    """
    size = options.samples_per_prompt
    samples = Path(options.output_dir) / "samples.jsonl"
    folder = Path(options.selection_dir or options.output_dir)
    scores, ended, lengths, verdicts, distinct = _columns(samples, size, options.keep_truncated)
    usable = verdicts == USABLE
    unused = {name: int((verdicts == name).sum()) for name in (CUT, EMPTY, REPEATED)}

    selected, threshold = _demonstrations(scores, usable, unused, options)
    top = best(scores, usable)
    lower = rejected(scores, usable, options.pairs, (options.seed, PAIR_STREAM, options.round))
    with (
        replacing(folder / "demonstrations.jsonl") as demonstrations,
        replacing(folder / "preferences.jsonl") as preferences,
    ):
        for index, group in enumerate(_groups(samples, size)):
            for number in np.flatnonzero(selected[index]):
                demonstrations.write(to_lines([{name: group[number][name] for name in DEMONSTRATION}]))
            if lower[index].any():
                pair = (group[mask[index].argmax()] for mask in (top, lower))
                preferences.write(to_lines([_preference(*pair)]))

    report = {
        "prompts": len(scores),
        "samples": scores.size,
        "response_tokens": int(lengths.sum()),
        "score": {"mean": scores.mean(), "std": scores.std(), "best": scores[top].mean()},
        "ended": ended.mean(),
        "max_response_length": options.max_response_length,
        "distinct": distinct.sum() / scores.size,
        "unused": unused,
        "threshold": threshold,
        "demonstrations": int(selected.sum()),
        "prompts_with_demonstrations": int(selected.any(1).sum()),
        "score_of_demonstrations": scores[selected].mean(),
        "preferences": int(lower.sum()),
        "selection": {k: v for k, v in asdict(options.selection).items() if k != "selection_dir"},
    }
    write_json(folder / "report.json", report)
    return report


def _columns(samples: Path, size: int, keep_truncated: bool) -> Iterator[np.ndarray]:
    """Scores, ended, lengths and verdicts, (P, n) each, and how many responses differ (P,)."""
    columns = [], [], [], [], []
    for group in _groups(samples, size):
        texts, ended = ([sample[name] for sample in group] for name in ("completion", "ended"))
        scores, lengths = ([sample[name] for sample in group] for name in ("score", "length"))
        verdicts = classify(texts, ended, keep_truncated)
        for column, values in zip(columns, (scores, ended, lengths, verdicts, len(set(texts))), strict=True):
            column.append(values)
    return map(np.array, columns)


def _demonstrations(
    scores: np.ndarray, usable: np.ndarray, unused: dict[str, int], options: BestOfNOptions
) -> tuple[np.ndarray, float | None]:
    """Mask of the demonstrations (P, n), and the threshold if any. Raises UserError when there are none."""
    if not usable.any():
        raise UserError(
            f"{options.output_dir}/samples.jsonl: none of the {usable.size} responses is usable;"
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
    selected = above(scores, usable, threshold)
    if not selected.any():
        median, highest = np.quantile(scores[usable], (0.5, 1))
        raise UserError(
            f"--threshold {threshold:g}: no usable response reaches it (median score {median:.3f},"
            f" highest {highest:.3f})"
        )
    return selected, threshold


def _preference(chosen: Sample, rejected: Sample) -> dict[str, Any]:
    margin = round(chosen["score"] - rejected["score"], 6)
    texts = {"chosen": chosen["completion"], "rejected": rejected["completion"]}
    ends = {"chosen_ended": chosen["ended"], "rejected_ended": rejected["ended"]}
    return {"prompt": chosen["prompt"], **texts, **ends, "margin": margin}


def _groups(path: Path, size: int) -> Iterator[list[Sample]]:
    """The samples, grouped by prompt."""
    with path.open("rb") as lines:
        yield from iter(lambda: [json.loads(line) for line in islice(lines, size)], [])

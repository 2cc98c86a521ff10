"""Scoring of a JSONL file of responses: the output has the same records with `score` added.

    bash launch/score.sh --reward_model_name_or_path OUT2/final --input F.jsonl --output G.jsonl

The same command resumes after the last complete line of the output.
"""

import contextlib
import fcntl
import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.data.batching import micro_batch
from common.data.journal import stop_resumably
from common.data.readers import read_source
from common.data.records import LARGE_SHARE, BadRecords, fraction, load_object, parse_record, warn_of_left_out
from common.data.rendering_report import Rendered, log_rendering
from common.data.sources import files_to_read, parse_source, repetitions
from common.model.loading import fit_to_model, load_config, plain_config
from common.model.reward_ensemble import RewardModel, combine, load_encoders, load_members, member_scores
from common.runtime.distributed import log, on_cpu
from common.runtime.files import exists, is_file, naming
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from common.runtime.process import on_refusal, run_main, stop_between_steps
from common.text.record_formats import Record
from common.text.segments import find_prompt
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped, fit_demonstration
from step2_reward.data import Response
from step2_reward.options import ScoreOptions

WINDOW = 4096  # records per window: read, sorted by length, scored and written together
TOLERANCE = 0.05  # for scores of the same models on another machine
Example = tuple[Record, dict[SegmentEncoder, list[int]]]  # input record; token ids for each encoder


def main() -> None:
    # 1. Validate options and first records before loading a model.
    options = parse_options(ScoreOptions)
    encoders = load_encoders(options)
    for path in options.reward_model_name_or_path:
        options = fit_to_model(options, load_config(path))
    file, done, end, written = open_output(options.output)
    examples = read_examples(options, encoders, done)
    windows = iter(lambda: list(islice(examples, WINDOW)), [])
    first = next(windows, [])
    describe_first_records(options, first, done, encoders[0])
    zero = plain_config(options.bf16 and not on_cpu(), options.attn_implementation)
    members = load_members(options, encoders, zero)

    # 2. Score window by window. An incomplete last window is scored again: the same batches give the same
    # bytes, and its lines must match the scores of these models.
    for window in chain([first], windows):
        stop_resumably(f"{done} records scored", options.output)
        lines = score_window(members, window, options, f"scoring records {done + 1} to {done + len(window)}")
        check_written(written, lines, options)
        stop_between_steps()
        with naming(Path(options.output)):
            file.seek(end)
            file.truncate()
            file.writelines(lines)
            file.flush()
        done, end, written = done + len(lines), file.tell(), []
        log(f"{done} records scored")


def open_output(path: str) -> tuple[BinaryIO, int, int, list[bytes]]:
    """Open and lock the output. Also return records and bytes before the last window, and its complete lines.

    A new file is deleted again if the run is refused. Raises UserError when the file cannot be opened.
    """
    is_new = not exists(path)
    if not (is_new or is_file(path)):
        raise UserError(f"--output {path}: must be a file, not a folder or a device")
    try:
        file = Path(path).open("a+b")  # noqa: SIM115 - open and locked until the process ends
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from None
    if is_new:
        on_refusal(lambda: Path(path).stat().st_size or Path(path).unlink())
    file.seek(0)
    done, begin, lines = 0, 0, []
    for number, line in enumerate(complete for complete in file if complete.endswith(b"\n")):
        if number % WINDOW == 0:
            done, begin, lines = number, file.tell() - len(line), []
        lines.append(line)
    return file, done, begin, lines


def read_examples(options: ScoreOptions, encoders: Sequence[SegmentEncoder], done: int) -> Iterator[Example]:
    """Yield the records after the first `done` good ones, repeated by the source's weight.

    Raises UserError naming file and line of a bad record.
    """
    source = parse_source(options.input)
    files = files_to_read(source, is_training=False)
    records = chain.from_iterable(((name, *row) for row in read_source(name)) for name in files)
    bad, good, is_begun = BadRecords(options.skip_bad_records), 0, done > 0
    if not options.skip_bad_records and source.weight == 1:  # finished records need not be parsed
        records, done = islice(records, done, None), 0
    read = num_truncated = 0
    for name, number, _, unparsed in records:
        example, times, read = None, 1, read + 1
        with bad.at(name, number):
            original = load_object(unparsed)
            record = parse_record(original)
            rows = {e: token_ids(record, e, options.max_length) for e in encoders}
            example = original, {e: ids for e, (ids, _) in rows.items()}
            num_truncated += any(truncated for _, truncated in rows.values())
            if source.weight != 1:
                times = repetitions(source.weight, fraction(find_prompt(record), "weight"))
        for _ in range(times * (example is not None)):
            good += 1
            if done:
                done -= 1
            else:
                yield example
    if not good and not is_begun:
        others = f"{read - bad.count} left out by the weight" if read > bad.count else ""
        raise bad.nothing_left(options.input, read, others)
    if bad.count:
        log(f"{options.input}: left out {bad.count} bad records")
        warn_of_left_out(bad.count, read)
    if num_truncated > LARGE_SHARE * read:
        log(
            f"warning: {num_truncated / read:.0%} of the prompts are truncated to --max_length"
            f" {options.max_length}"
        )


def describe_first_records(
    options: ScoreOptions, first: Sequence[Example], done: int, encoder: SegmentEncoder
) -> None:
    """Log how the records of the first window are rendered as text."""
    if not first:
        return
    is_all = not done and len(first) < WINDOW
    name = options.input if is_all else f"{options.input}, records {done + 1} to {done + len(first)}"
    is_string = [isinstance(find_prompt(parse_record(record)), str) for record, _ in first]
    source = Rendered(name, np.array(is_string), Response(first[0][1][encoder]))
    log_rendering([source], encoder, trains_on_replies=False)


def token_ids(record: Record, encoder: SegmentEncoder, max_length: int) -> tuple[list[int], bool]:
    """Tokenise prompt and response with a final EOS; also return whether the prompt was truncated.

    Raises ValueError with a message for the user.
    """
    if "response" in record:
        record = {**record, "completion": record["response"]}
    if "messages" not in record and not {"prompt", "completion"} <= record.keys():
        raise ValueError("must have 'prompt' and 'response' (or 'completion'), or 'messages'")
    try:
        row, truncated = fit_demonstration(record, encoder, max_length, "truncate_prompt", keep_end=True)
    except Dropped as why:
        raise ValueError(f"{why} for --max_length {max_length}") from None
    if "messages" in record and record["messages"][-1]["role"] != "assistant":
        raise ValueError("field 'messages' must end with an assistant message, the one to score")
    return row.ids, truncated


def score_window(
    members: list[RewardModel], window: list[Example], options: ScoreOptions, title: str
) -> list[bytes]:
    """Return an output line for each record. title: of the progress lines."""
    inputs = {encoder: [ids[encoder] for _, ids in window] for encoder, _ in members}
    scores = member_scores(members, inputs, micro_batch(options), title)  # (M, B)
    lines = []
    columns = combine(scores, options).tolist(), *scores.tolist()
    for (record, _), *row in zip(window, *columns, strict=True):
        combined, *members_scores = [round(score, 6) for score in row]
        added = {"score": combined, "scores": members_scores} if members_scores[1:] else {"score": combined}
        lines.append(f"{json.dumps({**record, **added}, default=str)}\n".encode())
    return lines


def check_written(written: list[bytes], lines: list[bytes], options: ScoreOptions) -> None:
    """Raise UserError unless the lines already written match the new ones up to TOLERANCE."""
    same, added = 0, {"score": 0, "scores": 0}
    with contextlib.suppress(Exception):  # the file may hold anything
        for old, new in zip(map(json.loads, written), map(json.loads, lines), strict=False):
            is_near = math.isclose(old["score"], new["score"], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
            same += is_near and {**old, **added} == {**new, **added}
    if same < len(written):
        raise UserError(
            f"--output {options.output}: holds other scores than those of these models on --input; choose"
            " another file"
        )


if __name__ == "__main__":
    run_main(main)

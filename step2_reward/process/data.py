"""Labelled steps: from records to tokens, and micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data.batching import pad_rows
from common.runtime.distributed import device
from common.text.fields import as_number, shown
from common.text.reasoning_steps import step_ends
from common.text.record_formats import Record
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped, fit_demonstration

RIGHT = 0.5  # a step is right from this label on


class LabelledSteps(NamedTuple):
    """Token ids of a prompt and a response, and the K labelled steps of the response."""

    ids: list[int]
    ends: list[int]  # (K,) index of the last token of each step
    labels: list[float]  # (K,) probability that the step is right: 1 or 0, or between them

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def num_until_error(self) -> int:
        """Number of steps up to the first wrong one, with it; all if none is wrong."""
        right = sum(1 for _ in takewhile(lambda label: label >= RIGHT, self.labels))
        return min(right + 1, len(self.labels))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B records with N labelled steps."""

    input_ids: Tensor  # (B, T) padded on the right
    rows: Tensor  # (N,) record of each step
    columns: Tensor  # (N,) last token of each step
    labels: Tensor  # (N,)
    until_error: Tensor  # (N,) bool: up to the first wrong step of the record, with it


def tokenize_steps(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str, separator: str
) -> tuple[LabelledSteps, bool]:
    """Tokenise a record with `prompt`, `steps` and `labels`; also return whether it was truncated.

    `completions` is another name of `steps`. The response is the steps, joined by the separator; its last
    step ends at EOS. Steps with label null are left out. Raises Dropped or ValueError.
    """
    steps, labels = parse_steps(record, separator)
    response = {"prompt": record["prompt"], "completion": separator.join(steps)}
    row, truncated = fit_demonstration(response, encoder, max_length, overlong, keep_end=True)
    start, last = row.start, len(row.ids) - 1
    ends = step_ends(row.ids[start:last], separator, encoder.decode)
    ends = [start + end for end in ends if start + end < last][: len(steps) - 1]
    if not (truncated and overlong == "truncate_response"):  # which cuts the last step, or more
        if len(ends) < len(steps) - 1:
            raise ValueError(
                f"field 'steps': only {len(ends) + 1} of {len(steps)} steps are left in the tokens: the"
                f" tokenizer or the chat template changes --step_separator {separator!r}"
            )
        ends.append(last)
    labelled = [(end, label) for end, label in zip(ends, labels, strict=False) if label is not None]
    if not labelled:
        raise Dropped("no labelled step")
    return LabelledSteps(row.ids, *map(list, zip(*labelled, strict=True))), truncated


def parse_steps(record: Record, separator: str) -> tuple[list[str], list[float | None]]:
    """Read steps, without a separator at their ends, and their labels. Raises ValueError."""
    name = "completions" if "completions" in record and "steps" not in record else "steps"
    for field in ("prompt", name, "labels"):
        if field not in record:
            raise ValueError(
                f"field {field!r} is missing (labelled steps have 'prompt' + 'steps' + 'labels')"
            )
    steps, labels = record[name], record["labels"]
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"field {name!r} must be a list of one step or more")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise ValueError(f"field 'labels' must be a list of {len(steps)} labels, one per step")
    texts = []
    for number, step in enumerate(steps, start=1):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(f"field {name!r}: step {number} is {shown(step)}; it must be text")
        texts.append(step.removesuffix(separator))
        if separator in texts[-1]:
            raise ValueError(f"field {name!r}: step {number} contains --step_separator {separator!r}")
    return texts, [_label(label, number) for number, label in enumerate(labels, start=1)]


def _label(value: Any, number: int) -> float | None:
    if value is None:
        return None
    label = float(value) if isinstance(value, bool) else as_number(value)
    if label is None or not 0 <= label <= 1:
        raise ValueError(
            f"field 'labels': that of step {number} is {shown(value)}; allowed: true, false, null, or the"
            " probability that the step is right, from 0 to 1"
        )
    return label


def collate(records: Sequence[LabelledSteps], pad_token_id: int) -> Batch:
    """Lay out records as padded rows of a micro-batch."""
    steps = [
        (row, end, label, number < record.num_until_error)
        for row, record in enumerate(records)
        for number, (end, label) in enumerate(zip(record.ends, record.labels, strict=True))
    ]
    columns = (torch.tensor(column).to(device()) for column in zip(*steps, strict=True))  # (N,) each
    return Batch(pad_rows([record.ids for record in records], pad_token_id).to(device()), *columns)

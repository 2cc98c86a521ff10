"""Tokenised demonstrations with a mask of trained tokens."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, assert_never

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.data.batching import pad_rows
from common.data.examples import Examples
from common.data.loading import load_examples
from common.model.sequence_parallel import part_of_row
from common.runtime.distributed import device
from common.runtime.row_groups import ranks_per_row
from common.text.record_formats import Record
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped, fit_demonstration
from step1_sft.options import SFTOptions


class Demonstration(NamedTuple):
    """Token ids of one dialogue, and a mask of the tokens that enter the loss."""

    ids: list[int]
    is_trained: list[bool]

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first trained one."""
        return self.ids[: self.is_trained.index(True)]


class Batch(NamedTuple):
    """One micro-batch, padded on the right. The hidden state at each true position predicts one label."""

    input_ids: Tensor  # (B, T)
    positions: Tensor  # (B, T) bool
    labels: Tensor  # (N,) trained tokens, row by row
    position_ids: Tensor | None  # (B, T) restart at 0 with each demonstration; None without packed rows


def load_demonstrations(
    options: SFTOptions, encoder: SegmentEncoder
) -> tuple[Examples[Demonstration], list[Demonstration]]:
    """Load training and held-out demonstrations. Raises UserError."""
    convert = partial(
        tokenize_demonstration, encoder=encoder, max_length=options.max_length, overlong=options.overlong,
        loss_on=options.loss_on,
    )  # fmt: skip
    return load_examples(options.train_data, options, Demonstration, convert)


def tokenize_demonstration(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str, loss_on: str
) -> tuple[Demonstration, bool]:
    """Tokenise a record; also return whether it was truncated to `max_length` (see `fit`).

    Raises Dropped or ValueError.
    """
    row, truncated = fit_demonstration(record, encoder, max_length, overlong)
    match loss_on:
        case "prompt_and_response":
            is_trained = [True] * len(row.ids)
        case "response":
            is_trained = list(row.is_response)
        case _:
            assert_never(loss_on)
    is_trained[0] = False  # no position predicts the first token
    if not any(is_trained):
        raise Dropped("no token to train on")
    return Demonstration(row.ids, is_trained), truncated


def collate(rows: Sequence[Sequence[Demonstration]], pad_token_id: int) -> Batch:
    """Pad rows of one or more demonstrations into a micro-batch.

    Position ids restart with each demonstration, and attention with them. Padding after packed demonstrations
    has position 0, so that each padding token attends to itself only.
    """
    input_ids = pad_rows([[i for part in row for i in part.ids] for row in rows], pad_token_id).to(device())
    is_trained = pad_rows([[t for part in row for t in part.is_trained] for row in rows], False).to(device())
    positions = torch.zeros_like(is_trained)  # (B, T), like the two above
    positions[:, :-1] = is_trained[:, 1:]
    position_ids = None
    if any(len(row) > 1 for row in rows):
        position_ids = pad_rows([[p for part in row for p in range(part.length)] for row in rows], 0)
        position_ids = position_ids.to(device())  # (B, T)
    batch = Batch(input_ids, positions, input_ids[is_trained], position_ids)
    return part_of_batch(batch) if ranks_per_row() > 1 else batch


def part_of_batch(batch: Batch) -> Batch:
    """This rank's part of each row, for --sequence_parallel; position ids are those in the row."""
    width = batch.input_ids.shape[1]
    missing = -width % ranks_per_row()
    input_ids, positions = (pad(part, (0, missing)) for part in (batch.input_ids, batch.positions))
    columns = torch.arange(width + missing, device=input_ids.device).expand_as(input_ids)
    labels = input_ids.roll(-1, dims=1)  # (B, T) of each position
    input_ids, positions, columns, labels = map(part_of_row, (input_ids, positions, columns, labels))
    return Batch(input_ids, positions, labels[positions], columns)

"""Demonstrations as token ids with a mask of the tokens to learn from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.data import pad_rows
from common.distributed import device
from common.formatting import demonstration_segments
from common.records import Record
from common.tokenization import SegmentEncoder
from step1_sft.options import SFTOptions


class Demonstration(NamedTuple):
    """Token ids of one dialogue, and for each whether it is to be learnt."""

    ids: list[int]
    is_trained: list[bool]

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first learnt one."""
        return self.ids[: self.is_trained.index(True)]


class Batch(NamedTuple):
    """One micro-batch, padded on the right. The state at a true position predicts the label there."""

    input_ids: Tensor  # (B, T)
    positions: Tensor  # (B, T) bool
    labels: Tensor  # (N,) the learnt tokens, row by row


def demonstration(record: Record, encoder: SegmentEncoder, options: SFTOptions) -> Demonstration | None:
    """Tokenise a record and cut it to --max_length on the right; None when nothing is left to learn."""
    segments = demonstration_segments(record, encoder.render, encoder.tokenizer.eos_token)
    ids, is_response = encoder.encode(segments)
    ids, is_response = ids[: options.max_length], is_response[: options.max_length]
    if options.loss_on == "prompt_and_response":
        is_response = [True] * len(ids)
    is_response[0] = False  # nothing comes before the first token to predict it
    return Demonstration(ids, is_response) if any(is_response) else None


def collate(rows: Sequence[Demonstration], pad_token_id: int) -> Batch:
    """Pad a micro-batch and find the positions whose next token is to be learnt."""
    input_ids = pad_rows([row.ids for row in rows], pad_token_id).to(device())  # (B, T)
    is_trained = pad_rows([row.is_trained for row in rows], False).to(device())  # (B, T)
    positions = torch.zeros_like(is_trained)
    positions[:, :-1] = is_trained[:, 1:]
    return Batch(input_ids, positions, input_ids[is_trained])

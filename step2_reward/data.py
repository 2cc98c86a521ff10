"""Preferences as pairs of token ids."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.data import pad_rows
from common.distributed import device
from common.formatting import Segment, demonstration_segments, preference_segments
from common.records import Record
from common.tokenization import SegmentEncoder
from step2_reward.options import RewardOptions


class Preference(NamedTuple):
    """Token ids of two dialogues with the same prompt, both ending in EOS, and by how much one is better."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float  # by how much the chosen one is better, if the records say so
    is_tie: bool = False  # neither is better

    @property
    def length(self) -> int:
        return max(len(self.chosen_ids), len(self.rejected_ids))


class Batch(NamedTuple):
    """One micro-batch of B pairs: chosen and rejected in one tensor, so that one forward pass scores both."""

    input_ids: Tensor  # (2B, T) the B chosen rows, then the B rejected ones, padded on the right
    lengths: Tensor  # (2B,)
    margins: Tensor  # (B,)
    is_tie: Tensor  # (B,) bool


def preference(record: Record, encoder: SegmentEncoder, options: RewardOptions) -> Preference:
    """Tokenise a record; each side is cut to --max_length (see `fit`)."""
    chosen, rejected = preference_segments(record, encoder.render, encoder.tokenizer.eos_token)
    margin = record.get("margin", 0.0) if options.use_margin else 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise ValueError(f"field 'margin' is {margin!r}; it must be a number")
    sides = (fit(segments, encoder, options.max_length) for segments in (chosen, rejected))
    return Preference(*sides, float(margin), bool(record.get("tie", False)))


def demonstration_ids(record: Record, encoder: SegmentEncoder, options: RewardOptions) -> list[int]:
    """Token ids of a demonstration whose last response is to be scored."""
    segments = demonstration_segments(record, encoder.render, encoder.tokenizer.eos_token)
    return fit(segments, encoder, options.max_length)


def fit(segments: Sequence[Segment], encoder: SegmentEncoder, max_length: int) -> list[int]:
    """Ids of at most `max_length` tokens that end in EOS, where the score is read.

    A long prompt loses its beginning, down to one token; then a long response loses its end, but never its
    EOS.
    """
    prompt, _ = encoder.encode(segments[:-1])
    whole, _ = encoder.encode(segments)
    response = whole[len(prompt) :]
    if len(response) >= max_length:
        response = response[: max_length - 2] + response[-1:]
    return prompt[-(max_length - len(response)) :] + response


def collate(rows: Sequence[Preference], pad_token_id: int) -> Batch:
    """Pad a micro-batch of pairs."""
    sides = [row.chosen_ids for row in rows] + [row.rejected_ids for row in rows]
    lengths = torch.tensor([len(ids) for ids in sides], device=device())
    margins = torch.tensor([row.margin for row in rows], device=device())
    is_tie = torch.tensor([row.is_tie for row in rows], device=device())
    return Batch(pad_rows(sides, pad_token_id).to(device()), lengths, margins, is_tie)

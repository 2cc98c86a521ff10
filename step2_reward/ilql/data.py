"""Scored responses: from records to tokens, and micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.data.batching import pad_rows
from common.data.examples import Examples
from common.runtime.distributed import device, log
from common.runtime.options import UserError
from common.text.record_formats import Record
from common.text.scored_response import read_score
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped, fit_demonstration


class ScoredResponse(NamedTuple):
    """Token ids of a dialogue, a mask of its response tokens, and the score."""

    ids: list[int]
    is_response: list[bool]  # never the first token, which no state predicts
    score: float

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def num_actions(self) -> int:
        """Number of response tokens."""
        return sum(self.is_response)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B dialogues with N response tokens, which are the actions, row by row."""

    input_ids: Tensor  # (B, T) padded on the right
    is_action: Tensor  # (B, T) bool
    actions: Tensor  # (N,)
    is_last: Tensor  # (N,) bool: the last action of each dialogue
    rewards: Tensor  # (N,) the score at the last action, else 0


class Scale(NamedTuple):
    """What makes rewards of scores: (score - mean) / std."""

    mean: float = 0.0
    std: float = 1.0


def tokenize_scored(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str
) -> tuple[ScoredResponse, bool]:
    """Tokenise a record with `prompt`, `response` and `score`; also return whether it was truncated.

    `completion` is another name of `response`. Of `messages` with a `score`, all assistant turns are actions.
    Raises Dropped or ValueError.
    """
    score = read_score(record)
    row, truncated = fit_demonstration(record, encoder, max_length, overlong)
    scored = ScoredResponse(row.ids, [False, *row.is_response[1:]], score)
    if not scored.num_actions:
        raise Dropped("no response token")
    return scored, truncated


def scale_of(train: Examples[ScoredResponse], standardise: bool, sources: Sequence[str]) -> Scale:
    """Scale of the training scores. Raises UserError if all are equal and should be standardised."""
    scores = train.column("score")
    mean, std = float(scores.mean()), float(scores.std())
    log(f"scores of {len(scores)} responses: mean {mean:.4g}, standard deviation {std:.4g}")
    if not standardise:
        return Scale()
    if np.ptp(scores) == 0:
        raise UserError(f"{' '.join(sources)}: all scores are {mean:g}; ILQL learns from their differences")
    return Scale(mean, std)


def collate(rows: Sequence[ScoredResponse], pad_token_id: int, scale: Scale) -> Batch:
    """Lay out dialogues as padded rows of a micro-batch."""
    input_ids = pad_rows([row.ids for row in rows], pad_token_id)
    is_action = pad_rows([row.is_response for row in rows], False)
    last = torch.tensor([row.num_actions for row in rows]).cumsum(0) - 1  # (B,)
    rewards = torch.zeros(int(is_action.sum()))
    rewards[last] = torch.tensor([(row.score - scale.mean) / scale.std for row in rows])
    is_last = torch.zeros_like(rewards, dtype=torch.bool)
    is_last[last] = True
    parts = input_ids, is_action, input_ids[is_action], is_last, rewards
    return Batch(*(part.to(device()) for part in parts))

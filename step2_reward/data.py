"""Tokenised preferences: rows, micro-batches, and margins."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain, combinations
from operator import itemgetter
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from common.data.batching import pad_rows
from common.data.examples import Examples
from common.data.loading import load_examples
from common.model.shared_prompt import pad_shared_rows, shared_row
from common.runtime.distributed import device, log
from common.runtime.options import UserError
from common.text.conversation import Segment
from common.text.fields import number
from common.text.record_formats import CHOSEN_PROBABILITY, Record
from common.text.segments import has_ended, parse_comparison, preference_segments
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Prompt, fit, fit_demonstration
from step2_reward.harm import harmful_first
from step2_reward.options import Objective, RewardOptions

LARGEST_MARGIN = 1e6  # a larger one drowns all other pairs


class Preference(NamedTuple):
    """Token ids of a prompt and of K responses to it, best first. Each is scored at its final EOS."""

    prompt_ids: list[int]
    response_ids: list[int]  # concatenated responses
    response_lengths: list[int]  # (K,)
    ranks: list[float]  # (K,) ascending; equal ranks are ties
    margin: float = 0.0  # of a pair: preference margin of the record, or 0
    probability: float = 1.0  # of a pair: that the first is better, from a soft label
    best_ended: bool = True  # false: the first response is truncated; its EOS is no language-model label
    signs: list[float] = []  # (2,) of a pair for a cost model, the more harmful first: 1 harmful, -1 harmless

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def responses(self) -> list[list[int]]:
        """Token ids of each response, best first."""
        ends = accumulate(self.response_lengths)
        return [self.response_ids[end - n : end] for n, end in zip(self.response_lengths, ends, strict=True)]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of responses, the better one first."""
        return list(combinations(range(len(self.ranks)), 2))

    @property
    def pair_facts(self) -> list[tuple[bool, float, float, float, float, float]]:
        """Tie flag, margin, weight (1 / pairs of the record), probability of the label, and the signs of harm
        of both responses (0 without), for each pair.
        """
        signs = self.signs or [0.0, 0.0]
        margin = 0.0 if self.ranks[0] == self.ranks[-1] else self.margin
        weight = 1 / len(self.pairs)
        ties = [self.ranks[i] == self.ranks[j] for i, j in self.pairs]
        return [(is_tie, margin, weight, 0.5 if is_tie else self.probability, *signs) for is_tie in ties]

    @property
    def language_length(self) -> int:
        """Number of language-model labels in the best response."""
        return self.response_lengths[0] - (not self.best_ended)

    @property
    def chosen_ids(self) -> list[int]:
        """The prompt and the best response."""
        return self.prompt_ids + self.response_ids[: self.response_lengths[0]]


class Response(NamedTuple):
    """Token ids of a prompt and a response, scored at its final EOS."""

    ids: list[int]

    @property
    def length(self) -> int:
        return len(self.ids)


class Layout(NamedTuple):
    """Row layout of a record: one row per response, or one row with the prompt shared by all responses."""

    pad_token_id: int
    share_prompts: bool = False

    def row_lengths(self, row: Preference) -> list[int]:
        """Length of each row of a record."""
        separate = [len(row.prompt_ids) + length for length in row.response_lengths]
        return [row.length] if self.share_prompts else separate

    def shapes(self, records: Sequence[Preference]) -> list[tuple[int, int]]:
        """Number of rows of each record, and tokens of the longest, as `deal` takes them."""
        return [(len(lengths), max(lengths)) for lengths in map(self.row_lengths, records)]


class Batch(NamedTuple):
    """One micro-batch: B records with N responses and P pairs of them, in order, on R rows of tokens."""

    input_ids: Tensor  # (R, T) padded on the right
    position_ids: Tensor  # (R, T) each response continues from the end of the prompt
    segments: Tensor  # (R, T) 0: prompt; 1, 2, ...: responses of the row; -1: padding
    is_best: Tensor  # (R, T) bool, tokens of each record's first response, but for the EOS of a truncated one
    better: Tensor  # (P,) index of the better response among the N
    worse: Tensor  # (P,)
    is_tie: Tensor  # (P,) bool
    margins: Tensor  # (P,)
    weights: Tensor  # (P,) 1 / pairs of the record, so that all records weigh the same
    targets: Tensor  # (P,) probability that the label is right: 1, less for a soft label, 1/2 for a tie
    better_signs: Tensor  # (P,) of harm, for a cost model; else 0
    worse_signs: Tensor  # (P,)
    share_prompts: bool  # whether a row may hold several responses


def load_preferences(
    options: RewardOptions, encoder: SegmentEncoder
) -> tuple[Examples[Preference], list[Preference]]:
    """Load training and held-out preferences. Raises UserError."""
    convert = partial(
        converter(options.objective, options.use_margin), encoder=encoder, max_length=options.max_length,
        overlong=options.overlong,
    )  # fmt: skip
    train, held_out = load_examples(options.train_data, options, Preference, convert)
    check_margins(options, train, held_out)
    return train, held_out


def converter(objective: Objective, use_margin: bool) -> Callable[..., tuple[Preference, bool]]:
    """The function that tokenises a record for a reward or a cost model."""
    match objective:
        case "reward":
            return partial(tokenize_preference, use_margin=use_margin)
        case "cost":
            return tokenize_harm
        case _:
            assert_never(objective)


def tokenize_harm(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str
) -> tuple[Preference, bool]:
    """`tokenize_preference` with the more harmful response first, and the signs of both."""
    ordered, signs = harmful_first(record)
    row, truncated = tokenize_preference(ordered, encoder, max_length, overlong, use_margin=False)
    return row._replace(signs=signs), truncated


def tokenize_preference(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str, use_margin: bool
) -> tuple[Preference, bool]:
    """Tokenise a record; also return whether it was truncated to `max_length` (see `fit`).

    A truncated response (`chosen_ended` or `rejected_ended` is false) gets an EOS too: step 3 scores it so.
    Raises Dropped or ValueError.
    """
    margin = number(record, "margin") if use_margin else 0.0
    if not 0 <= margin <= LARGEST_MARGIN:
        raise ValueError(f"field 'margin' is {margin:g}; it must be from 0 to {LARGEST_MARGIN:g}")
    if margin and "ranks" in record:
        raise ValueError("field 'margin' belongs to a pair; a record with 'ranks' cannot have one")
    compared = parse_comparison(record)

    def segments(prompt: Prompt) -> list[list[Segment]]:
        shorter = compared._replace(prompt=prompt)
        return preference_segments(shorter, encoder.render, encoder.tokenizer.eos_token)

    sides, truncated = fit(compared.prompt, segments, encoder, max_length, overlong, keep_end=True)
    # Dialogues may differ before their last response; the prompt is their common prefix.
    prompt = os.path.commonprefix([side.ids[: side.start] for side in sides])
    by_rank = sorted(zip(compared.ranks, sides, strict=True), key=itemgetter(0))
    responses = [side.ids[len(prompt) :] for _, side in by_rank]
    ranks = [float(rank) for rank, _ in by_rank]
    best = min(zip(compared.ranks, compared.responses, strict=True), key=itemgetter(0))[1]
    facts = margin, record.get(CHOSEN_PROBABILITY, 1.0), has_ended(record, f"{best}_ended")
    return Preference(prompt, [*chain(*responses)], [*map(len, responses)], ranks, *facts), truncated


def check_margins(
    options: RewardOptions, train: Examples[Preference], held_out: Sequence[Preference]
) -> None:
    """Raise UserError if --use_margin is on and no record has a margin; warn if some have none."""
    if not options.use_margin:
        return
    num_margins = int((train.column("margin") != 0).sum())
    if not num_margins:
        raise UserError(
            f"--use_margin: no record of {' '.join(options.train_data)} has a 'margin' other than 0; add the"
            " field, or turn the option off"
        )
    for name, count, total in (
        ("training", num_margins, len(train)),
        ("held-out", sum(row.margin != 0 for row in held_out), len(held_out)),
    ):
        if count < total:
            log(f"warning: --use_margin: {total - count} of {total} {name} records have no 'margin', or 0")


def tokenize_response(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str
) -> tuple[Response, bool]:
    """Tokenise a demonstration for scoring its last response; also return whether it was truncated."""
    row, truncated = fit_demonstration(record, encoder, max_length, overlong, keep_end=True)
    return Response(row.ids), truncated


def collate(rows: Sequence[Preference], layout: Layout) -> Batch:
    """Lay out records as padded rows of a micro-batch."""
    shared_rows, is_best, pairs = [], [], []
    count = 0
    for row in rows:
        for (i, j), facts in zip(row.pairs, row.pair_facts, strict=True):
            pairs.append((count + i, count + j, *facts))
        count += len(row.ranks)
        start = len(row.prompt_ids)
        row_responses = row.responses
        for responses in [row_responses] if layout.share_prompts else [[r] for r in row_responses]:
            shared_rows.append(shared_row(row.prompt_ids, responses))
            best = range(start, start + row.language_length * (responses[0] is row_responses[0]))
            is_best.append([position in best for position in range(len(shared_rows[-1].ids))])
    tokens = (*pad_shared_rows(shared_rows, layout.pad_token_id), pad_rows(is_best, False))  # (R, T) each
    columns = (torch.tensor(column) for column in zip(*pairs, strict=True))  # (P,) each
    return Batch(*(part.to(device()) for part in (*tokens, *columns)), layout.share_prompts)

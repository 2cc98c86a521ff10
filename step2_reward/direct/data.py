"""Tokenised preferences for direct optimisation, in pairs or as single labelled responses."""

from collections.abc import Sequence
from itertools import accumulate, chain, combinations
from operator import itemgetter
from typing import NamedTuple

from common.text.conversation import Segment
from common.text.fields import flag
from common.text.record_formats import CHOSEN_PROBABILITY, Record
from common.text.segments import has_ended, parse_comparison, preference_segments
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped, Prompt, fit, fit_demonstration


class Dialogue(NamedTuple):
    """Token ids of a dialogue, and the start of its last response."""

    ids: list[int]
    start: int

    @property
    def num_predicted(self) -> int:
        """Number of response tokens, without a first token that no position predicts."""
        return len(self.ids) - max(self.start, 1)


class WeightedPair(NamedTuple):
    """Indices of two responses of a record. The weights of a record's pairs sum to 1."""

    better: int
    worse: int
    weight: float
    is_label: bool  # the order of the label; false for ties and for the less likely order of a soft label


class Choice(NamedTuple):
    """Token ids of N dialogues with responses to the same prompt, best first."""

    ids: list[int]  # concatenated dialogues
    lengths: list[int]  # (N,) tokens per dialogue
    starts: list[int]  # (N,) start of the response in each dialogue
    ranks: list[float]  # (N,) ascending, equal ranks are ties; unpaired: probability of being undesirable
    probability: float = 1.0  # of a pair: that the first is better, from a soft label

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def dialogues(self) -> list[Dialogue]:
        """Each response with its context."""
        ends = accumulate(self.lengths)
        parts = zip(ends, self.lengths, self.starts, strict=True)
        return [Dialogue(self.ids[end - length : end], start) for end, length, start in parts]

    @property
    def pairs(self) -> list[WeightedPair]:
        """All pairs of responses, weighted by the probability of their order.

        Ties and soft labels give both orders of a pair.
        """
        combined = list(combinations(range(len(self.ranks)), 2))
        pairs = []
        for i, j in combined:
            is_tie = self.ranks[i] == self.ranks[j]
            share = 0.5 if is_tie else self.probability
            pairs.append(WeightedPair(i, j, share / len(combined), not is_tie))
            if share < 1:
                pairs.append(WeightedPair(j, i, (1 - share) / len(combined), False))
        return pairs

    def sides(self, is_paired: bool) -> list[tuple[float, float]]:
        """Weight of each response as chosen and as rejected, from its pairs or from its label."""
        if not is_paired:
            return [(1.0 - rank, rank) for rank in self.ranks]
        weights = [[0.0, 0.0] for _ in self.ranks]
        for pair in self.pairs:
            weights[pair.better][0] += pair.weight
            weights[pair.worse][1] += pair.weight
        return [(chosen, rejected) for chosen, rejected in weights]


class Example(NamedTuple):
    """A record with its reference log-probabilities; 0 where the loss needs none."""

    row: Choice
    logprobs: list[float]  # (N,)
    unrelated: Dialogue | None  # kto: the prompt with a response to another prompt
    unrelated_logprob: float
    partners: Sequence[tuple[float, float]] = ()  # aot: see `aot_loss`; one entry per pair of the row

    @property
    def dialogues(self) -> list[Dialogue]:
        """The responses, then the unrelated one."""
        return self.row.dialogues + ([self.unrelated] if self.unrelated else [])

    @property
    def width(self) -> int:
        """Tokens of the longest dialogue."""
        return max(len(dialogue.ids) for dialogue in self.dialogues)


def tokenize_paired(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str
) -> tuple[Choice, bool]:
    """Tokenise a preference; also return whether it was truncated to `max_length` (see `fit`).

    A truncated response (`chosen_ended` or `rejected_ended` is false) gets no EOS. Raises Dropped or
    ValueError.
    """
    if "label" in record and "completion" in record:
        raise ValueError(
            "is a single response with a 'label', which --loss kto takes, or apo_zero_unpaired; this loss"
            " needs pairs: 'prompt' + 'chosen' + 'rejected', or 'prompt' + 'responses' + 'ranks'"
        )
    compared = parse_comparison(record)
    ended = [has_ended(record, f"{name}_ended") for name in compared.responses]

    def segments(prompt: Prompt) -> list[list[Segment]]:
        shorter = compared._replace(prompt=prompt)
        sides = preference_segments(shorter, encoder.render, encoder.tokenizer.eos_token)
        return [[*side[:-1], side[-1]._replace(ends=ends)] for side, ends in zip(sides, ended, strict=True)]

    sides, truncated = fit(compared.prompt, segments, encoder, max_length, overlong)
    by_rank = sorted(zip(compared.ranks, sides, strict=True), key=itemgetter(0))
    dialogues = [Dialogue(side.ids, side.start) for _, side in by_rank]
    choice = _choice(dialogues, [float(rank) for rank, _ in by_rank])
    return choice._replace(probability=record.get(CHOSEN_PROBABILITY, 1.0)), truncated


def tokenize_unpaired(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str
) -> tuple[Choice, bool]:
    """Tokenise a labelled response; also return whether it was truncated. Raises Dropped or ValueError.

    A preference is split: its best responses become desirable, its worst undesirable, the others are dropped.
    Ties are dropped. A soft label makes the best response desirable with its probability, and the worst with
    the rest; the loss is the expectation.
    """
    if {"chosen", "rejected", "responses", "ranks"} & record.keys():
        choice, truncated = tokenize_paired(record, encoder, max_length, overlong)
        best, worst = choice.ranks[0], choice.ranks[-1]
        if best == worst:
            raise Dropped("ties")
        split = [(d, r) for d, r in zip(choice.dialogues, choice.ranks, strict=True) if r in (best, worst)]
        undesirable = {best: 1 - choice.probability, worst: choice.probability}
        return _choice([d for d, _ in split], [undesirable[r] for _, r in split]), truncated
    if "label" not in record:
        raise ValueError(
            "field 'label' is missing (--loss kto takes 'prompt' + 'completion' + 'label', or preferences)"
        )
    row, truncated = fit_demonstration(record, encoder, max_length, overlong)
    return _choice([Dialogue(row.ids, row.start)], [float(not flag(record, "label"))]), truncated


def _choice(dialogues: Sequence[Dialogue], ranks: list[float]) -> Choice:
    ids = [*chain(*(dialogue.ids for dialogue in dialogues))]
    lengths = [len(dialogue.ids) for dialogue in dialogues]
    return Choice(ids, lengths, [dialogue.start for dialogue in dialogues], ranks)

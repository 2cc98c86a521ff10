"""Preferences as dialogues to be read by a policy, in pairs or one by one."""

from collections.abc import Sequence
from itertools import accumulate, chain, combinations
from operator import itemgetter
from typing import NamedTuple

from common.text.conversation import Segment
from common.text.fields import flag
from common.text.record_formats import CHOSEN_PROBABILITY, Record
from common.text.segments import comparison, has_ended, preference_segments
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped, Prompt, fit, fit_demonstration


class Dialogue(NamedTuple):
    """Token ids of a dialogue, and where its last response begins."""

    ids: list[int]
    start: int

    @property
    def count(self) -> int:
        """Tokens of the response, but for one that nothing comes before."""
        return len(self.ids) - max(self.start, 1)


class Pair(NamedTuple):
    """Two responses of a record, by their places; all pairs of a record weigh 1."""

    better: int
    worse: int
    weight: float
    is_label: bool  # what the record says: neither a tie nor the order that a soft label has less likely


class Choice(NamedTuple):
    """Token ids of N responses to a prompt, each behind all that comes before it, best first."""

    ids: list[int]  # all dialogues, one after the other
    lengths: list[int]  # (N,) tokens of each dialogue
    starts: list[int]  # (N,) where its response begins
    ranks: list[float]  # (N,) rising, equal ones are a tie; not in pairs, the probability that it is bad
    probability: float = 1.0  # of a pair: that the first is better, where the label is soft

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def dialogues(self) -> list[Dialogue]:
        """Each response with what comes before it."""
        ends = accumulate(self.lengths)
        parts = zip(ends, self.lengths, self.starts, strict=True)
        return [Dialogue(self.ids[end - length : end], start) for end, length, start in parts]

    @property
    def pairs(self) -> list[Pair]:
        """Every two responses, the better one first; also in the other order, as far as that may be true: a
        tie is half a win for either side, a soft label a win for each by its probability.
        """
        two = list(combinations(range(len(self.ranks)), 2))
        found = []
        for i, j in two:
            is_tie = self.ranks[i] == self.ranks[j]
            share = 0.5 if is_tie else self.probability
            found.append(Pair(i, j, share / len(two), not is_tie))
            if share < 1:
                found.append(Pair(j, i, (1 - share) / len(two), False))
        return found

    def sides(self, is_paired: bool) -> list[tuple[float, float]]:
        """How much each response counts as chosen and as rejected: as in the pairs of it, or as its label."""
        if not is_paired:
            return [(1.0 - rank, rank) for rank in self.ranks]
        weights = [[0.0, 0.0] for _ in self.ranks]
        for pair in self.pairs:
            weights[pair.better][0] += pair.weight
            weights[pair.worse][1] += pair.weight
        return [(chosen, rejected) for chosen, rejected in weights]


def tokenize_paired(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str
) -> tuple[Choice, bool]:
    """Tokenise a preference; whether it was cut to `max_length` (see `fit`). Raises Dropped or ValueError.

    A response of which `chosen_ended` or `rejected_ended` is false was cut, and EOS is not what comes next.
    """
    if "label" in record and "completion" in record:
        raise ValueError(
            "is a single response with a 'label', which --loss kto takes; this loss takes pairs:"
            " 'prompt' + 'chosen' + 'rejected', or 'prompt' + 'responses' + 'ranks'"
        )
    compared = comparison(record)
    ended = [has_ended(record, f"{name}_ended") for name in compared.responses]

    def segments(prompt: Prompt) -> list[list[Segment]]:
        shorter = compared._replace(prompt=prompt)
        sides = preference_segments(shorter, encoder.render, encoder.tokenizer.eos_token)
        return [[*side[:-1], side[-1]._replace(ends=ends)] for side, ends in zip(sides, ended, strict=True)]

    sides, is_cut = fit(compared.prompt, segments, encoder, max_length, overlong)
    by_rank = sorted(zip(compared.ranks, sides, strict=True), key=itemgetter(0))
    dialogues = [Dialogue(side.ids, side.start) for _, side in by_rank]
    choice = _choice(dialogues, [float(rank) for rank, _ in by_rank])
    return choice._replace(probability=record.get(CHOSEN_PROBABILITY, 1.0)), is_cut


def tokenize_unpaired(
    record: Record, encoder: SegmentEncoder, max_length: int, overlong: str
) -> tuple[Choice, bool]:
    """Tokenise a response with a label; whether it was cut. Raises Dropped or ValueError.

    A preference is split: its best responses are desirable, its worst are not, those between are left out; of
    a tie nothing is left. With a soft label each response is both, the best one desirable by its probability
    and the worst one by the rest: the loss is the expected one, and the nearer to a tie, the less is learnt.
    """
    if {"chosen", "rejected", "responses", "ranks"} & record.keys():
        whole, is_cut = tokenize_paired(record, encoder, max_length, overlong)
        best, worst = whole.ranks[0], whole.ranks[-1]
        if best == worst:
            raise Dropped("ties")
        kept = [(d, r) for d, r in zip(whole.dialogues, whole.ranks, strict=True) if r in (best, worst)]
        is_bad = {best: 1 - whole.probability, worst: whole.probability}
        return _choice([d for d, _ in kept], [is_bad[r] for _, r in kept]), is_cut
    if "label" not in record:
        raise ValueError(
            "field 'label' is missing (--loss kto takes 'prompt' + 'completion' + 'label', or a preference,"
            " which it splits)"
        )
    row, is_cut = fit_demonstration(record, encoder, max_length, overlong)
    return _choice([Dialogue(row.ids, row.start)], [float(not flag(record, "label"))]), is_cut


def _choice(dialogues: Sequence[Dialogue], ranks: list[float]) -> Choice:
    ids = [*chain(*(dialogue.ids for dialogue in dialogues))]
    lengths = [len(dialogue.ids) for dialogue in dialogues]
    return Choice(ids, lengths, [dialogue.start for dialogue in dialogues], ranks)

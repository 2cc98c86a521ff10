"""The pairs that a model judges, those of rankings too."""

from collections.abc import Sequence
from itertools import chain, combinations

from common.data.records import read_all
from common.runtime.distributed import log
from common.text.record_formats import Record, recognise
from common.text.segments import comparison
from step2_reward.pairs import Pair, to_pair


def read_pairs(sources: Sequence[str], skip_bad_records: bool) -> list[Pair]:
    """All pairs, those of rankings too. Raises UserError naming file and line of a bad record."""
    by_record, bad = read_all(
        sources, lambda record: [to_pair(pair) for pair in two_by_two(record)], skip_bad_records
    )
    found = [*chain(*by_record)]
    log(f"{' '.join(sources)}: {len(found)} pairs; left out {bad} bad records")
    return found


def two_by_two(record: Record) -> list[Record]:
    """A ranking as pairs, the better one chosen; anything else as it is."""
    if "responses" not in record:
        return [record]
    asked, responses, ranks = comparison(recognise(record))
    found = []
    for one, other in combinations(zip(ranks, responses.values(), strict=True), 2):
        (rank_chosen, chosen), (rank_rejected, rejected) = sorted([one, other], key=lambda ranked: ranked[0])
        is_tie = rank_chosen == rank_rejected
        found.append({"prompt": asked, "chosen": chosen, "rejected": rejected, "tie": is_tie})
    return found

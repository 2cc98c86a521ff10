"""Pairs for the judge, also from rankings."""

from collections.abc import Sequence
from itertools import chain, combinations

from common.data.records import read_all
from common.runtime.distributed import log
from common.text.record_formats import Record, normalise_record
from common.text.segments import parse_comparison
from step2_reward.pairs import Pair, to_pair


def read_judge_pairs(sources: Sequence[str], skip_bad_records: bool) -> list[Pair]:
    """Read pairs, and all pairs of rankings. Raises UserError naming file and line of a bad record."""
    by_record, bad = read_all(
        sources, lambda record: [to_pair(pair) for pair in split_ranking(record)], skip_bad_records
    )
    pairs = [*chain(*by_record)]
    log(f"{' '.join(sources)}: {len(pairs)} pairs; {bad} bad records skipped")
    return pairs


def split_ranking(record: Record) -> list[Record]:
    """Split a ranking into pairs, with the better response as `chosen`; return other records unchanged."""
    if "responses" not in record:
        return [record]
    prompt, responses, ranks = parse_comparison(normalise_record(record))
    pairs = []
    for one, other in combinations(zip(ranks, responses.values(), strict=True), 2):
        (rank_chosen, chosen), (rank_rejected, rejected) = sorted([one, other], key=lambda ranked: ranked[0])
        is_tie = rank_chosen == rank_rejected
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "tie": is_tie})
    return pairs

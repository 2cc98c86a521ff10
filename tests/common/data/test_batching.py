"""Micro-batches of a number of tokens, padding included."""

from itertools import chain, combinations

import numpy as np
import pytest

from common.data import batching
from common.data.batching import Tokens, batches_of_own, deal, fill, fill_evenly, micro_batch
from step1_sft.options import SFTOptions
from step1_sft.packing import micro_batches

Shapes = list[tuple[int, int]]


def padded(part: list[int], shapes: Shapes) -> int:
    return sum(shapes[i][0] for i in part) * max(shapes[i][1] for i in part)


def shapes_of(seed: int, count: int) -> Shapes:
    """Records with 1 to 3 rows of 1 to 30 tokens, shortest first."""
    generator = np.random.default_rng(seed)
    widths = sorted(generator.integers(1, 31, count).tolist())
    return list(zip(generator.integers(1, 4, count).tolist(), widths, strict=True))


def all_divisions(count: int, parts: int) -> list[list[list[int]]]:
    """Every way to cut a row of examples into `parts` pieces."""
    cuts = [[0, *between, count] for between in combinations(range(1, count), parts - 1)]
    return [[[*range(a, b)] for a, b in zip(cut, cut[1:], strict=False)] for cut in cuts]


def test_fill_counts_padding():
    """Rows of 2, 3, 5, 5 and 9 tokens: 3 rows of 5 fit into 15, 4 do not; 9 is more than 8 tokens."""
    shapes = [(1, length) for length in (2, 3, 5, 5, 9)]
    assert fill(range(5), shapes, 15) == [[0, 1, 2], [3], [4]]
    assert fill(range(5), shapes, 14) == [[0, 1], [2, 3], [4]]
    assert fill(range(5), shapes, 8) == [[0, 1], [2], [3], [4]]
    assert fill([0, 1], [(2, 4), (1, 6)], 18) == [[0, 1]] and fill([0, 1], [(2, 4), (1, 6)], 17) == [[0], [1]]
    assert fill([], [], 8) == []


@pytest.mark.parametrize("seed", range(8))
def test_fill_makes_the_fewest_and_fill_evenly_the_smallest(seed):
    """Against all ways to cut the examples, shortest first, into pieces."""
    shapes, tokens = shapes_of(seed, 8), 70 + 10 * seed
    fewest = next(
        parts
        for parts in range(1, 9)
        if any(
            all(len(part) == 1 or padded(part, shapes) <= tokens for part in division)
            for division in all_divisions(8, parts)
        )
    )
    assert len(fill(range(8), shapes, tokens)) == fewest
    for count in range(fewest, 9):
        largest = min(max(padded(p, shapes) for p in division) for division in all_divisions(8, count))
        parts = fill_evenly(range(8), shapes, tokens, count)
        assert len(parts) == count and all(parts) and sorted(chain(*parts)) == list(range(8))
        assert max(padded(part, shapes) for part in parts) == largest


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 40, 100, 500, 10**9])
def test_ranks_get_as_many_micro_batches_within_the_budget(tokens, ranks):
    """24 records, a multiple of all ranks: no rank is left without one. They come in any order."""
    shapes = shapes_of(0, 24)
    order = np.random.default_rng(1).permutation(24).tolist()
    lengths = [width for _, width in shapes]
    parts = [deal(order, lengths, Tokens(tokens), rank, ranks, shapes) for rank in range(ranks)]
    micro = [*chain(*parts)]
    assert len({len(part) for part in parts}) == 1 and all(micro)
    assert sorted(chain(*micro)) == list(range(24))
    assert all(len(part) == 1 or padded(part, shapes) <= tokens for part in micro)
    fewest = len(fill(range(24), shapes, tokens))
    assert fewest <= len(micro) < fewest + ranks


def test_few_records_leave_ranks_empty():
    """As in evaluation; the first rank never is."""
    parts = [deal(range(2), [5, 4], Tokens(100), rank, 3) for rank in range(3)]
    assert parts == [[[1]], [[0]], [[]]]


def test_ranks_with_rows_of_their_own_make_as_many(monkeypatch):
    """Another rank has made four."""
    monkeypatch.setattr(batching, "gather_objects", lambda count: [count, 4])
    assert batches_of_own([6, 2, 3, 7, 1], Tokens(14)) == [[4, 1], [2], [0], [3]]
    assert batches_of_own([6, 2, 3, 7, 1], 2) == [[4, 1], [2, 0], [3]]


def test_options_choose_the_size():
    rows, tokens = SFTOptions(micro_batch_size=3), SFTOptions(micro_batch_size=3, micro_batch_tokens=50)
    assert micro_batch(rows) == 2 and micro_batch(rows, 7) == 7  # 3 does not divide a global batch of 32
    for size in (micro_batch(tokens), micro_batch(tokens, 7)):
        assert size == 50 and isinstance(size, Tokens)


def test_packed_rows_stay_within_the_budget():
    """Rows of up to 30 tokens, two of them in 75 tokens."""
    lengths = np.random.default_rng(0).integers(2, 31, 40).tolist()
    options = SFTOptions(packing=True, max_length=30, micro_batch_tokens=75)
    micro = [rows for rows, is_real in micro_batches(lengths, options) if is_real]
    tokens = [[sum(lengths[i] for i in row) for row in rows] for rows in micro]
    assert sorted(i for rows in micro for row in rows for i in row) == list(range(40))
    assert max(len(rows) * max(sizes) for rows, sizes in zip(micro, tokens, strict=True)) <= 75
    assert max(map(len, micro)) == 2

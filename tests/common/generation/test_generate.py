"""Which prompts each rank reads."""

import pytest

from common.generation import generate
from common.generation.generate import prompts_of_rank


def dealt(monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], ranks: int) -> list[list[int]]:
    monkeypatch.setattr(generate, "world_size", lambda: ranks)
    rows = []
    for rank in range(ranks):
        monkeypatch.setattr(generate, "rank", lambda rank=rank: rank)
        rows.append(prompts_of_rank(prompts))
    return rows


def test_lengths_are_dealt_in_turn(monkeypatch):
    prompts = [[1], [1, 2, 3, 4], [1, 2], [1, 2, 3]]
    assert dealt(monkeypatch, prompts, 2) == [[0, 3], [2, 1]]


def test_responses_to_one_prompt_stay_on_a_rank(monkeypatch):
    prompts = [[7, 8]] * 4 + [[9]] * 4
    assert dealt(monkeypatch, prompts, 2) == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_a_prompt_is_divided_if_ranks_would_get_unequal_numbers(monkeypatch):
    prompts = [[7, 8]] * 4 + [[9]] * 4
    assert dealt(monkeypatch, prompts, 4) == [[4, 5], [6, 7], [0, 1], [2, 3]]
    rows = dealt(monkeypatch, [[1]] * 3 + [[2]] * 3, 2)
    assert rows == [[0, 1, 2], [3, 4, 5]]
    rows = dealt(monkeypatch, [[1]] * 3 + [[2]] * 3 + [[3]] * 2, 4)
    assert [len(part) for part in rows] == [2] * 4 and sorted(sum(rows, [])) == [*range(8)]

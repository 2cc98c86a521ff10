"""Caches in place against those of transformers."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, Qwen3NextConfig

from common.generation.cache import InPlaceCache, InPlaceLayer, JoinedCache, is_in_place

ROWS, HEADS, COLUMNS, SIZE = 5, 2, 9, 3
CONFIG = LlamaConfig(num_hidden_layers=2)


def states(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, HEADS, columns, SIZE), torch.randn(rows, HEADS, columns, SIZE + 1)


def test_keys_and_values_are_those_of_a_growing_cache_and_stay_where_they_are():
    """Prompts of 4 and of 2 tokens, steps, rows that leave, and steps to the last column."""
    torch.manual_seed(0)
    cache = InPlaceCache(DynamicCache(config=CONFIG), ROWS, (ROWS + 1, COLUMNS))
    former = JoinedCache(DynamicCache(config=CONFIG))
    for rows, length, owners in ((slice(0, 3), 4, [0, 0, 1]), (slice(3, 5), 2, [0, 1])):
        groups = [one.group(rows, 4 - length, torch.tensor(owners)) for one in (cache, former)]
        for layer in range(2):
            keys, values = states(max(owners) + 1, length)
            for group in groups:
                assert group.get_seq_length(layer) == 0
                read = group.update(keys, values, layer)
                assert torch.equal(read[0], keys) and torch.equal(read[1], values)
    ours, theirs = cache.join(), former.join()
    address = [layer.keys.data_ptr() for layer in ours.layers]
    assert ours.get_seq_length() == theirs.get_seq_length() == 4
    for count, order in ((5, [0, 4, 2, 3]), (4, None), (4, [2, 1]), (2, None), (2, None)):
        for layer in range(2):
            new = states(count, 1)
            assert ours.get_mask_sizes(1, layer) == theirs.get_mask_sizes(1, layer)
            for our, their in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(our, their)
        if order:
            ours.reorder_cache(torch.tensor(order))
            theirs.reorder_cache(torch.tensor(order))
    assert [layer.keys.data_ptr() for layer in ours.layers] == address
    assert ours.layers[0].keys.shape == (ROWS + 1, HEADS, COLUMNS, SIZE)


def test_padding_is_zeros():
    """Masked columns have weight 0, and 0 x NaN is NaN."""
    cache = InPlaceCache(DynamicCache(config=CONFIG), 2, (2, 6))
    cache.group(slice(1, 2), 3, torch.tensor([0])).update(*states(1, 2), 0)
    assert not cache.cache.layers[0].keys[0].any() and not cache.cache.layers[0].keys[1, :, :3].any()


def test_other_caches_are_not_in_place():
    assert is_in_place(DynamicCache(config=CONFIG))
    window = LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    window.sliding_window = 4
    for config in (
        window,
        Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]),
    ):
        assert not is_in_place(DynamicCache(config=config))


@pytest.mark.parametrize("order", [[0, 1], [3, 1], [2, 4, 0]])
def test_only_rows_that_move_are_written(order):
    layer = InPlaceLayer(ROWS, (ROWS, COLUMNS))
    layer.update(*states(ROWS, 2))
    before = layer.keys.clone()
    layer.reorder_cache(torch.tensor(order))
    assert torch.equal(layer.keys[: len(order)], before[order])
    assert torch.equal(layer.keys[len(order) :], before[len(order) :])

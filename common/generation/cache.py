"""Caches of a batch: keys and values of its prompts, and room for those of its responses."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class InPlaceLayer(DynamicLayer):
    """Keys and values in buffers (B, H, C, D) for all rows and columns, written in place.

    Attention reads a view of the filled columns. The layers of transformers copy all keys and values with
    each token.
    """

    def __init__(self, rows: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.size, self.length = rows, size, 0  # size: at least `rows` rows; columns
        self.prompts: tuple[slice, int, Tensor] | None = None  # rows, padding and owners of the prompts read

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers. Padding is zeros: attention gives it weight 0, and 0 x NaN would be NaN."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(self.size[0], states.shape[1], self.size[1], states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:  # (b, H, T, D) each
        """Write new columns, and return the filled ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.prompts:
            rows, padding, owners = self.prompts
            self.length = padding + key_states.shape[2]
            self.keys[rows, :, padding : self.length] = key_states[owners]
            self.values[rows, :, padding : self.length] = value_states[owners]
            return key_states, value_states
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[: self.rows, :, start : self.length] = key_states
        self.values[: self.rows, :, start : self.length] = value_states
        return self.keys[: self.rows, :, : self.length], self.values[: self.rows, :, : self.length]

    def get_seq_length(self) -> int:
        return 0 if self.prompts else self.length

    def reorder_cache(self, order: Tensor) -> None:
        """Move row order[i] to row i, for the rows that move; later rows are dropped. order: on the CPU."""
        self.rows = len(order)
        target = (order != torch.arange(self.rows)).nonzero().squeeze(-1)
        for buffer in (self.keys, self.values):
            buffer[target, :, : self.length] = buffer[order[target], :, : self.length]


class InPlaceCache:
    """Reads groups of prompts into one cache of `InPlaceLayer`s."""

    def __init__(self, empty: Cache, rows: int, size: tuple[int, int]) -> None:
        empty.layers = [InPlaceLayer(rows, size) for _ in empty.layers]
        self.cache = empty

    def group(self, rows: slice, padding: int, owners: Tensor) -> Cache:
        """Cache for a forward pass over some prompts; owners (b,): the prompt of each of the b rows."""
        for layer in self.cache.layers:
            layer.prompts = rows, padding, owners
        return self.cache

    def join(self) -> Cache:
        """The cache of all rows, as if all prompts had been padded to the longest."""
        for layer in self.cache.layers:
            layer.prompts = None
        return self.cache


class JoinedCache:
    """Reads groups of prompts into caches of transformers, which are concatenated. Works for every family."""

    def __init__(self, empty: Cache) -> None:
        self.empty, self.caches, self.owners = empty, [], []

    def group(self, _rows: slice, _padding: int, owners: Tensor) -> Cache:
        """As `InPlaceCache.group`."""
        self.owners.append(owners)
        self.caches.append(copy.deepcopy(self.empty))
        return self.caches[-1]

    def join(self) -> Cache:
        """As `InPlaceCache.join`."""
        for cache, owners in zip(self.caches, self.owners, strict=True):
            if len(owners) > int(owners[-1]) + 1:  # owners are 0, 1, 2, ..., some of them repeated
                cache.reorder_cache(owners)  # every cache class has it, for beam search
        return _concatenate(self.caches) if len(self.caches) > 1 else self.caches[0]


def is_in_place(cache: Cache) -> bool:
    """Whether all layers keep all keys and values: no sliding windows, no recurrent states."""
    return bool(cache.layers) and all(type(layer) in (DynamicLayer, InPlaceLayer) for layer in cache.layers)


def can_pad(cache: Cache) -> bool:
    """Whether the cache holds only keys and values, which can be padded on the left."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _concatenate(caches: Sequence[Cache]) -> Cache:
    """Concatenate caches along rows, padded on the left to the longest; attention masks the padding."""
    joined = max(caches, key=lambda cache: cache.get_seq_length())
    layers = zip(*(cache.layers for cache in caches), strict=True)
    for layer, parts in zip(joined.layers, layers, strict=True):
        width = layer.keys.shape[2]
        for name in ("keys", "values"):
            states = [getattr(part, name) for part in parts]  # (b, H, T, D) each
            for part in parts:  # so that no more than one layer is in memory twice
                setattr(part, name, None)
            padded = [pad(state, (0, 0, width - state.shape[2], 0)) for state in states]
            setattr(layer, name, torch.cat(padded))
    return joined

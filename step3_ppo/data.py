"""The minibatches of a rollout."""

from collections.abc import Iterator

import numpy as np


def minibatches(rows: int, size: int, epochs: int, seed: int, step: int) -> Iterator[list[int]]:
    """Row numbers of each minibatch of each epoch: every epoch a new order, the same on every rank."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, 2, step, epoch)).permutation(rows).tolist()
        for start in range(0, rows, size):
            yield order[start : start + size]

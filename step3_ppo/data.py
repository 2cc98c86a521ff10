"""Prompts as token ids, and the minibatches of a rollout."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from common.formatting import Message, find_prompt, prompt_segments
from common.records import Record
from common.tokenization import SegmentEncoder
from step3_ppo.options import PPOOptions


class Prompt(NamedTuple):
    """Token ids of a prompt, and the prompt itself for a reward model that reads other tokens."""

    ids: list[int]
    source: str | list[Message]


def prompt(record: Record, encoder: SegmentEncoder, options: PPOOptions) -> Prompt:
    """Tokenise a prompt; of a long one the last --max_prompt_length tokens stay."""
    source = find_prompt(record)
    ids, _ = encoder.encode(prompt_segments(source, encoder.render, encoder.tokenizer.eos_token))
    return Prompt(ids[-options.max_prompt_length :], source)


def minibatches(rows: int, size: int, epochs: int, seed: int, step: int) -> Iterator[list[int]]:
    """Row numbers of each minibatch of each epoch: every epoch a new order, the same on every rank."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, 2, step, epoch)).permutation(rows).tolist()
        for start in range(0, rows, size):
            yield order[start : start + size]

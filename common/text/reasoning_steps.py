"""Steps of a response: where each one ends in its tokens. Pure, given the decoder."""

from bisect import bisect_left
from collections.abc import Callable

Decode = Callable[[list[int]], str]


def step_ends(ids: list[int], separator: str, decode: Decode) -> list[int]:
    """Index of the last token of each step in a response without its end token; at least one step.

    Each separator ends a step, at the token that completes it: that token may also hold the last letters of
    the step, or the first ones of the next. Blank steps do not count. Text after the last separator is a step
    too; it ends at the end token, index `len(ids)`, and so does a response without text.
    """
    ends: list[int] = []
    start = 0
    while separator in decode(ids[start:]):
        sizes = range(start + 1, len(ids) + 1)
        size = sizes[bisect_left(sizes, True, key=lambda size: separator in decode(ids[start:size]))]
        if decode(ids[start:size]).replace(separator, " ").strip():
            ends.append(size - 1)
        start = size
    if not ends or decode(ids[start:]).strip():
        ends.append(len(ids))
    return ends

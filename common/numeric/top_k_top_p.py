"""Top-k and top-p sampling: sets of allowed tokens, as lists of their ids. Pure."""

from typing import NamedTuple

import torch
from torch import Tensor

OUTSIDE = -1e30  # logit of an excluded token; finite, so that 0 x log-probability is 0


class Support(NamedTuple):
    """The tokens that could be drawn at each of N states. Without ids, all could."""

    sizes: Tensor  # (N,) int32: how many
    ids: Tensor  # (S,) int32: those of the first state, then those of the second, ...

    @property
    def states(self) -> Tensor:
        """(S,) the state of each id."""
        rows = torch.arange(len(self.sizes), device=self.ids.device)
        return rows.repeat_interleave(self.sizes, output_size=len(self.ids))

    def split(self, states: int) -> list["Support"]:
        """Parts of this many states each."""
        sizes = self.sizes.split(states)
        counts = torch.stack([part.sum() for part in sizes]).tolist()
        return [Support(*part) for part in zip(sizes, self.ids.split(counts), strict=True)]


def support(logits: Tensor, top_k: int, top_p: float) -> Support:
    """The top_k likeliest tokens (0: all), and the likeliest of these that reach top_p: logits (N, V)."""
    if not top_k and top_p == 1.0:
        nothing = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
        return Support(nothing, nothing[:0])
    flags = is_allowed(logits.softmax(-1), top_k, top_p)
    return Support(flags.sum(-1, dtype=torch.int32), flags.nonzero()[:, 1].int())


def is_allowed(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Flags of the tokens in `support`: (..., V) -> (..., V) bool.

    Source: Holtzman et al. 2020, section 3.1; Fan et al. 2018.
    """
    ordered, order = probabilities.sort(-1, descending=True)
    if top_k:
        ordered = ordered[..., :top_k]
        order = order[..., :top_k]
    sums = ordered.cumsum(-1)
    is_within = sums - ordered < top_p * sums[..., -1:]
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, is_within)


def restrict(logits: Tensor, allowed: Support) -> Tensor:
    """Mask excluded tokens, so that the softmax is the sampling distribution: (N, V) -> (N, V) fp32."""
    if not len(allowed.ids):
        return logits
    is_excluded = torch.ones_like(logits, dtype=torch.bool)
    is_excluded[allowed.states, allowed.ids] = False
    return logits.float().masked_fill(is_excluded, OUTSIDE)


def by_row(steps: list[tuple[Tensor, Support]], lengths: Tensor) -> Tensor:
    """Sort the ids of all steps by row, then by step: (S,). Leaves out those after the end of a row.

    steps: for each step, its rows (b,) and their support. lengths: (B,) steps of each row.
    """
    if not any(len(allowed.ids) for _, allowed in steps):
        return steps[0][1].ids
    rows, ids = [], []
    for step, (drawn, allowed) in enumerate(steps):
        row = drawn[allowed.states]
        is_inside = step < lengths[row]
        rows.append(row[is_inside])
        ids.append(allowed.ids[is_inside])
    return torch.cat(ids)[torch.cat(rows).argsort(stable=True)]

"""Record the forward passes of a run on some ranks: what it read, not what it made of it."""

import contextlib
import itertools
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tests.recomputed.tiny import EOS


class Pass(NamedTuple):
    """One forward pass of a whole model."""

    is_policy: bool  # a language model; else one with a scalar head
    has_gradient: bool
    is_sampling: bool  # with a cache
    input_ids: list[list[int]]  # padded
    position_ids: list[list[int]] | None  # of responses that share a prompt; None: one text per row

    @property
    def positions(self) -> int:
        return len(self.input_ids) * len(self.input_ids[0])

    @property
    def responses(self) -> int:
        """The position ids of each response on a row continue from the prompt; those of padding may be 0."""
        if self.position_ids is None:
            return len(self.input_ids)
        return sum(1 + sum(0 < b <= a for a, b in itertools.pairwise(row)) for row in self.position_ids)


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Processes forked in this context write their passes to the folder."""

    def write(module: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Tensor], output: Any) -> None:  # noqa: ARG001 - as torch calls it
        if isinstance(module, LlamaForCausalLM | LlamaForSequenceClassification):
            is_sampling = inputs.get("past_key_values") is not None
            is_shared = not is_sampling and getattr(inputs.get("attention_mask"), "ndim", 0) == 4
            one = Pass(
                isinstance(module, LlamaForCausalLM),
                torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()),
                is_sampling,
                inputs["input_ids"].tolist(),
                inputs["position_ids"].tolist() if is_shared else None,
            )
            with (folder / f"passes.{os.environ['RANK']}").open("ab") as file:
                pickle.dump(one, file)

    hook = register_module_forward_hook(write, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def passes(folder: Path, rank: int) -> list[Pass]:
    """The passes of a rank, in order."""
    result = []
    with (folder / f"passes.{rank}").open("rb") as file, contextlib.suppress(EOFError):
        while True:
            result.append(pickle.load(file))
    return result


def check_budget(of_ranks: Sequence[Sequence[Pass]], tokens: int) -> None:
    """Passes that do not sample stay within `tokens` positions; every rank makes as many, not all alike."""
    of_ranks = [[one for one in of_rank if not one.is_sampling] for of_rank in of_ranks]
    assert len({len(of_rank) for of_rank in of_ranks}) == 1
    passes = [one for of_rank in of_ranks for one in of_rank]
    assert all(len(one.input_ids) == 1 or one.positions <= tokens for one in passes)
    assert len({len(one.input_ids) for one in passes}) > 1


def without_padding(row: list[int], start: int, longest: int) -> list[int]:
    """A row whose response starts at `start` and ends at its first EOS, or after `longest` tokens."""
    response = row[start : start + longest]
    if EOS in response:
        response = response[: response.index(EOS) + 1]
    return row[:start] + response

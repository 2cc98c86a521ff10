"""Sequence parallelism: a group of ranks shares the rows of a batch, each with a part of every row.

Attention exchanges parts of rows for parts of the heads and back; all else acts on each token alone. Source:
Jacobs et al. 2023 (DeepSpeed-Ulysses), section 3. Gradients need no special care: each rank's loss is that of
its tokens, and ZeRO sums gradients over all ranks.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_to_all_single
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.model.engine_protocol import Engine
from common.model.families import active_share
from common.model.forward import base_model
from common.model.probe import last_states, states_agree
from common.runtime.distributed import device, rank, sum_over_ranks
from common.runtime.options import UserError, world_size
from common.runtime.row_groups import ranks_per_row
from common.text.transformers_internals import attention_implementation

NAME = "sequence_parallel"
PROBE = 16  # tokens per rank of a row of the check
_group: Any = None


def check_heads(config: PretrainedConfig, path: str) -> None:
    """Raise UserError unless ranks can share the heads of the model, and its layers have full attention and a
    dense MLP.
    """
    text, count = config.get_text_config(), ranks_per_row()
    if count == 1:
        return
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None) or text.num_attention_heads
        if heads % count:
            raise UserError(f"--sequence_parallel {count}: must divide the {heads} {name} of {path}")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None) or active_share(config) != 1:
        raise UserError(
            f"--sequence_parallel {count}: {path} has layers other than full attention and a dense MLP;"
            " remove the option"
        )


def share_rows(engine: Engine) -> None:
    """Let the ranks of each group share rows. Raises UserError if the model then encodes them otherwise."""
    global _group
    count = ranks_per_row()
    if count == 1:
        return
    for start in range(0, world_size(), count):
        group = dist.new_group(range(start, start + count))
        _group = group if start <= rank() < start + count else _group
    AttentionInterface.register(NAME, exchanging_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # causal attention needs none
    base, ids = base_model(engine), torch.arange(PROBE * count, device=device())[None]
    kind, kernels = base.config.model_type, attention_implementation(base.config.get_text_config())
    plain = {"input_ids": ids % base.config.get_text_config().vocab_size, "position_ids": ids}
    parts = {name: part_of_row(tensor) for name, tensor in plain.items()}

    def encode_shared() -> Tensor:
        base.set_attn_implementation(NAME)
        return last_states(engine, base, **parts)[0]

    is_exact = kernels == "sdpa" and states_agree(
        engine, lambda: part_of_row(last_states(engine, base, **plain))[0], encode_shared
    )
    if sum_over_ranks(is_exact)[0] < world_size():
        raise UserError(
            f"--sequence_parallel {count}: not for a model of type {kind!r} with {kernels} kernels; remove"
            " the option"
        )


@contextlib.contextmanager
def unshared_rows(engine: Engine) -> Iterator[None]:
    """Context manager: each rank encodes rows of its own, as in generation."""
    base = base_model(engine)
    is_shared = attention_implementation(base.config.get_text_config()) == NAME
    if is_shared:
        base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if is_shared:
            base.set_attn_implementation(NAME)


def part_of_row(rows: Tensor) -> Tensor:
    """This rank's columns of rows (B, T, ...), T a multiple of the ranks that share them."""
    return rows.chunk(ranks_per_row(), dim=1)[rank() % ranks_per_row()]


def exchanging_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Causal attention of parts of rows: query, key, value (B, heads, T / N, head size), on N ranks each."""
    of_heads = (rows_for_heads(part) for part in (query, key, value))  # (B, heads / N, T, head size)
    states, _ = sdpa_attention_forward(module, *of_heads, None, **options)  # (B, T, heads / N, head size)
    return heads_for_rows(states), None


def rows_for_heads(part: Tensor) -> Tensor:
    """Exchange a part of all rows for a part of the heads: (B, H, T / N, D) -> (B, H / N, T, D)."""
    batch, heads, length, size = part.shape
    count = ranks_per_row()
    received = exchanged(part.view(batch, count, heads // count, length, size).movedim(1, 0))
    return received.movedim(0, 2).reshape(batch, heads // count, count * length, size)


def heads_for_rows(part: Tensor) -> Tensor:
    """Exchange a part of the heads for a part of all rows: (B, T, H / N, D) -> (B, T / N, H, D)."""
    batch, length, heads, size = part.shape
    count = ranks_per_row()
    received = exchanged(part.view(batch, count, length // count, heads, size).movedim(1, 0))
    return received.movedim(0, 2).reshape(batch, length // count, count * heads, size)


def exchanged(parts: Tensor) -> Tensor:
    """Send part i to rank i of the group: parts (N, ...) for N ranks -> (N, ...), part i from rank i."""
    parts = parts.contiguous()
    return all_to_all_single(torch.empty_like(parts), parts, group=_group)

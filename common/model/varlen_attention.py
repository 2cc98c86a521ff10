"""Attention kernels `varlen`: torch's own flash attention for rows without padding, in place of `sdpa`.

Models keep the name `sdpa`: some choose by it, and transformers refuses it for those that cannot.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def register() -> None:
    """Let all models with `sdpa` use these kernels."""
    AttentionInterface.register("sdpa", varlen_attention)


def is_registered() -> bool:
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is varlen_attention


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int = 0, sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each sequence of a row: query, key, value (1, heads, N, head size).

    cu_seq_lens_q: the first token of each sequence, and N at the end. Without it: `sdpa` with the mask.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"varlen attention has no {name}")
    lengths = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens before and after
    parts = (part[0].transpose(0, 1) for part in (query, key, value))  # (N, heads, head size) each
    result = varlen_attn(*parts, *lengths, scale=options.get("scaling"), window_size=window, enable_gqa=True)
    return result[None], None

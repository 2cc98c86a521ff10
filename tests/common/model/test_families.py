"""Configurations of unusual families: attention widths, active experts, refused routing."""

import pytest
from transformers import DeepseekV2Config, Gemma4TextConfig, LlamaConfig, PhimoeConfig, Qwen3MoeConfig

from common.model.families import active_share, attention_widths, check_policy
from common.runtime.options import UserError


def test_layers_of_different_attention_widths():
    """Gemma 4 has wider heads in its full-attention layers."""
    config = Gemma4TextConfig(num_hidden_layers=6, num_attention_heads=8, head_dim=16, global_head_dim=32)
    assert attention_widths(config) == [8 * 16] * 5 + [8 * 32]
    assert (
        attention_widths(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)) == [64] * 2
    )


def test_share_of_active_experts():
    assert active_share(Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2)) == 0.25
    assert active_share(Gemma4TextConfig(num_experts=8, top_k_experts=4)) == 0.5
    assert active_share(DeepseekV2Config(num_experts_per_tok=None)) == 1.0
    assert active_share(LlamaConfig()) == 1.0


def test_random_routing_is_refused():
    with pytest.raises(UserError, match="'phimoe' is not supported"):
        check_policy(PhimoeConfig())

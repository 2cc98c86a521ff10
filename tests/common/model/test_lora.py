"""Adapters: warnings for learning rates, and merged copies for sampling."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from common.model.lora import add_adapters, check_adapters, merged_adapters
from common.runtime.options import TrainOptions
from step3_ppo.options import PPOOptions


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (TrainOptions(), []),
        (TrainOptions(lora_rank=8), ["--learning_rate 1e-05"]),
        (TrainOptions(lora_rank=8, learning_rate=4e-5), ["--learning_rate 4e-05"]),
        (TrainOptions(lora_rank=8, learning_rate=1e-4), []),
        (PPOOptions(lora_rank=8), ["--actor_learning_rate", "--critic_learning_rate"]),
        (PPOOptions(lora_rank=8, advantage_estimator="rloo"), ["--actor_learning_rate"]),
        (PPOOptions(lora_rank=8, actor_learning_rate=3e-5, critic_learning_rate=1e-4), []),
    ],
)
def test_a_learning_rate_for_full_weights_gets_one_warning(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, options: TrainOptions, named: list[str]
) -> None:
    monkeypatch.setattr("common.model.lora.check_targets", lambda *_: None)  # needs a model
    check_adapters("", replace(options, lora_target_modules=["all-linear"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(named)
    for line, part in zip(lines, named, strict=True):
        assert part in line and "10 to 100 times" in line


def adapted(name: str, dtype: torch.dtype, targets: list[str]) -> torch.nn.Module:
    """A tied model whose adapters are not zero."""
    torch.manual_seed(0)
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"vocab_size": 30, "tie_word_embeddings": True}
        if name == "mixtral":
            experts = {"num_local_experts": 4, "num_key_value_heads": 2}
            model = MixtralForCausalLM(MixtralConfig(**sizes, **experts))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
    options = TrainOptions(lora_rank=4, lora_alpha=12.0, lora_target_modules=targets)
    model = add_adapters(model.to(dtype), options, seed=1).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["all-linear"]), ("llama", ["q_proj", "lm_head"]), ("gpt2", ["c_attn"]),
        ("mixtral", ["all-linear"]),
    ],
)  # fmt: skip
def test_merged_copies_give_the_same_logits(name: str, targets: list[str]) -> None:
    """GPT-2's matrices are transposed. An adapted output head leaves the tied embedding alone. The weights of
    experts are stacked, and in no linear layer.
    """
    model, ids = adapted(name, torch.float32, targets), torch.tensor([[3, 4, 5, 6]])
    before = {key: (value.data_ptr(), value.requires_grad) for key, value in model.named_parameters()}
    products = []
    for key, module in model.named_modules():
        if "lora_A" in key:
            module.register_forward_hook(lambda *_: products.append(1))
    with torch.no_grad():
        expected, without = model(ids).logits, None
        products.clear()
        with merged_adapters(model):
            merged = model(ids).logits
        assert not products, "one product per layer"
        with merged_adapters(model, enabled=False):
            assert torch.equal(model(ids).logits, expected)
        with model.disable_adapter():
            without = model(ids).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert (merged - without).abs().max() > 0.05
    after = {key: (value.data_ptr(), value.requires_grad) for key, value in model.named_parameters()}
    assert after == before


@pytest.mark.end_to_end
def test_weights_do_not_drift_in_a_thousand_merges() -> None:
    """In 16 bits; in between the adapter changes. Merged in place and back they would drift."""
    model = adapted("llama", torch.bfloat16, ["all-linear"])
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    before, naive = layer.base_layer.weight.clone(), layer.base_layer.weight.clone()
    for step in range(1000):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data += 0.01 * torch.randn_like(a)
        update = 3.0 * torch.einsum("or,ri->oi", b.detach().double(), a.detach().double())
        with merged_adapters(model):
            if step % 100 == 0:
                exact = before.double() + update
                assert torch.equal(layer.base_layer.weight.data, exact.float().bfloat16())
        naive = (naive.double() + update).bfloat16()
        naive = (naive.double() - update).bfloat16()
    assert torch.equal(layer.base_layer.weight, before) and layer.base_layer.weight.requires_grad is False
    assert not torch.equal(naive, before)


def test_an_error_restores_the_weights() -> None:
    model = adapted("llama", torch.float32, ["all-linear"])
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(KeyError), merged_adapters(model):
        raise KeyError
    assert [parameter.data_ptr() for parameter in model.parameters()] == before

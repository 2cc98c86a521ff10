"""Linear layers in 4 bits: against the definition of NF4, bitsandbytes' own layer, and plain matrices."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from common.generation.generate import PlainEngine
from common.generation.vllm_sampler import policy_weights
from common.model.lora import add_adapters, check_adapters, merge_4bit, merged_adapters
from common.model.nf4 import NF4Linear, linear_layers, nbytes, quantise
from common.runtime.options import LoraOptions, UserError
from common.training.metrics import training_flops
from launch.plan.memory import nf4_bytes
from launch.plan.shapes import read_shape
from tests.conftest import assert_close

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs common/model/requirements-qlora.txt")

# Dettmers et al. 2023 (QLoRA), appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
]  # fmt: skip
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
FOUR_BITS = LoraOptions(lora_rank=4, lora_alpha=12.0, load_in_4bit=True)


def llama(dtype: torch.dtype = torch.float32, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, initializer_range=0.2, **SIZES | changes)
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(options: LoraOptions = FOUR_BITS, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with adapters that are not zero, on a base in 4 bits."""
    model = add_adapters(llama(dtype), options, seed=1).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    return model


def plain_twin(model: nn.Module) -> LlamaForCausalLM:
    """The model without adapters, with the dequantised matrices as plain ones."""
    twin = llama(model.dtype)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, NF4Linear):
                path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                twin.get_submodule(path).weight.copy_(layer.dequantised(torch.float32))
    return twin


@pytest.mark.parametrize("shape", [(8, 64), (24, 40), (7, 6)], ids=str)
def test_weights_are_the_nearest_of_sixteen_in_each_block(shape: tuple[int, int]) -> None:
    """Blocks of 64 in the order of rows; the last one may be shorter."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    values, codes = linear.weight.detach().flatten(), torch.tensor(NF4)
    expected = torch.empty_like(values)
    for start in range(0, len(values), 64):
        block = values[start : start + 64]
        scale = block.abs().max()
        nearest = (block[:, None] / scale - codes).abs().argmin(1)
        expected[start : start + 64] = codes[nearest] * scale
    layer = NF4Linear(linear, is_double=False)
    assert_close(layer.dequantised(torch.float32), expected.view(shape))


@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_and_gradients_are_those_of_bitsandbytes(is_double: bool, dtype: torch.dtype) -> None:
    """Its own Linear4bit, which has kernels of its own."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 48).to(dtype)
    theirs = bitsandbytes.nn.Linear4bit(
        128, 48, compute_dtype=dtype, compress_statistics=is_double, quant_type="nf4"
    )
    theirs.load_state_dict({name: tensor.clone() for name, tensor in linear.state_dict().items()})
    theirs = theirs.to("cpu")
    ours = NF4Linear(linear, is_double)
    assert torch.equal(ours.weight.flatten(), theirs.weight.data.flatten())
    x = torch.randn(5, 128, dtype=dtype)
    results = []
    for layer in (ours, theirs):
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        output.square().sum().backward()
        results.append((output, inputs.grad))
    tolerance = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for one, other in zip(*results, strict=True):
        assert_close(one, other, **tolerance)
    assert ours.weight.grad is None and not ours.weight.requires_grad


def test_double_quantisation_changes_scales_a_little() -> None:
    linear = nn.Linear(512, 512)
    single, double = (NF4Linear(linear, flag).dequantised(torch.float32) for flag in (False, True))
    error = (single - double).abs().max() / single.abs().max()
    assert 0 < error < 0.02


@pytest.mark.parametrize("is_double", [False, True])
def test_bytes_are_those_of_the_plan(tmp_path: Path, is_double: bool) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    before, matrices = nbytes(model), [m.weight.numel() for m in linear_layers(model).values()]
    quantise(model, is_double)
    packed = sum(nf4_bytes(size, is_double) for size in matrices)
    assert nbytes(model) == before - 4 * sum(matrices) + packed
    shape = read_shape(
        str(tmp_path), False, 4, ("all-linear",), quantisation="double" if is_double else "single"
    )
    assert (shape.in_4bit, shape.bytes_of_4bit) == (sum(matrices), packed)
    bits = 8 * nf4_bytes(4096 * 4096, is_double) / 4096**2
    assert bits == pytest.approx(4.127 if is_double else 4.5, abs=1e-3)


def test_heads_embeddings_and_norms_stay() -> None:
    scalar = LlamaForSequenceClassification(LlamaConfig(num_labels=1, vocab_size=40, **SIZES))
    for model, head in ((llama(), "lm_head"), (scalar, "score")):
        quantise(model, True)
        in_float = {name for name, p in model.named_parameters() if p.is_floating_point()}
        assert {name.rsplit(".", 2)[-2] for name in in_float} == {
            head, "embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"
        }  # fmt: skip
        assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 2 * 7


def test_adapters_get_the_gradients_of_plain_matrices() -> None:
    """A plain model with the dequantised matrices, and the same adapters on them."""
    model, ids = adapted(), torch.arange(3, 15)[None]
    twin = add_adapters(plain_twin(model), LoraOptions(lora_rank=4, lora_alpha=12.0), seed=1)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for one in (model, twin):
        losses.append(one(ids, labels=ids).loss)
        losses[-1].backward()
    assert_close(losses[0], losses[1])
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 2 * 7
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name])
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in frozen.items())


def test_the_graph_holds_no_dequantised_matrix() -> None:
    layer = NF4Linear(nn.Linear(256, 256, bias=False), True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 256, requires_grad=True))
    assert not any(tensor.numel() >= 256 * 256 for tensor in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "lm_head"]], ids=str)
def test_merged_copies_are_rounded_once(dtype: torch.dtype, targets: list[str]) -> None:
    """Against a computation in double precision; layers without adapters are dequantised. The 4-bit weights
    come back.
    """
    options = LoraOptions(lora_rank=4, lora_alpha=12.0, lora_target_modules=targets, load_in_4bit=True)
    model, ids = adapted(options, dtype), torch.tensor([[3, 4, 5, 6]])
    packed = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    expected, pointers = {}, {name: m.weight.data_ptr() for name, m in packed.items()}
    for name, layer in packed.items():
        exact = layer.dequantised(torch.float32).double()
        owner = model.get_submodule(name.removesuffix(".base_layer"))
        if owner is not layer:
            a, b = owner.lora_A["default"].weight, owner.lora_B["default"].weight
            exact = exact + 3.0 * b.double() @ a.double()
        expected[name] = exact
    with torch.no_grad():
        logits = model(ids).logits
        with merged_adapters(model):
            for name, layer in packed.items():
                assert layer.weight.dtype == dtype
                assert within_one_rounding(layer.weight, expected[name]), name
            merged = model(ids).logits
    tolerance = {"rtol": 0, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0, "atol": 0.2}
    torch.testing.assert_close(merged, logits, **tolerance)
    assert {name: m.weight.data_ptr() for name, m in packed.items()} == pointers
    assert all(m.weight.dtype is torch.uint8 for m in packed.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_export_is_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """peft's adapter on the model before its quantisation takes the matrices of the trained one."""
    options = LoraOptions(lora_rank=4, lora_alpha=12.0, lora_target_modules=["q_proj", "lm_head"])
    model = adapted(dataclasses.replace(options, load_in_4bit=True), dtype)
    model.save_pretrained(tmp_path)
    export = PeftModel.from_pretrained(llama(dtype), tmp_path)
    merge_4bit(export, model)
    merged = export.merge_and_unload()
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            owner = model.get_submodule(name.removesuffix(".base_layer"))
            exact = layer.dequantised(torch.float32).double()
            if owner is not layer:
                a, b = owner.lora_A["default"].weight, owner.lora_B["default"].weight
                exact = exact + 3.0 * b.double() @ a.double()
            path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            weight = merged.get_submodule(path).weight
            assert weight.dtype == dtype
            assert within_one_rounding(weight, exact), name


def within_one_rounding(weight: torch.Tensor, exact: torch.Tensor) -> bool:
    """Half a unit in the last place, with room for the sums in fp32."""
    room = exact.abs() * torch.finfo(weight.dtype).eps / 2 + 4e-7 * exact.abs().max()
    return bool(((weight.double() - exact).abs() <= room).all())


def test_vllm_gets_plain_matrices() -> None:
    options = LoraOptions(lora_rank=4, lora_target_modules=["q_proj"], load_in_4bit=True)
    model = adapted(options)
    model.get_base_model().num_tokens = 40
    weights = dict(policy_weights(PlainEngine(model)))
    shapes = {name: weight.shape for name, weight in llama().state_dict().items()}
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    merged = adapted(options)
    with merged_adapters(merged):
        for name in ("q_proj", "k_proj"):
            layer = merged.get_base_model().model.layers[1].self_attn.get_submodule(name)
            expected = getattr(layer, "base_layer", layer).weight
            assert torch.equal(weights[f"model.layers.1.self_attn.{name}.weight"], expected)


@pytest.mark.parametrize("is_double", [False, True])
def test_transformers_quantises_alike(tmp_path: Path, is_double: bool) -> None:
    """Its own loading in 4 bits gives the same logits."""
    pytest.importorskip("accelerate")
    llama().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=is_double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    theirs.train()  # else bitsandbytes packs the weights for kernels of its own, in bf16
    ours, ids = llama(), torch.arange(3, 15)[None]
    quantise(ours, is_double)
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits.float(), rtol=1e-4, atol=1e-4)


def test_a_cast_of_the_model_leaves_the_scales() -> None:
    model = adapted()
    before = {n: m.dequantised(torch.float32) for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    model.to(torch.bfloat16)
    for name, weight in before.items():
        assert torch.equal(model.get_submodule(name).dequantised(torch.float32), weight)


def test_operations_count_two_weights_per_byte() -> None:
    plain, packed = (
        add_adapters(llama(), LoraOptions(lora_rank=4, load_in_4bit=flag), 0) for flag in (False, True)
    )
    assert training_flops(packed, [5, 7]) == training_flops(plain, [5, 7])


def test_what_cannot_be_in_4_bits_is_refused(tmp_path: Path) -> None:
    GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    stage_3 = {"zero_optimization": {"stage": 3}}
    for path, options, zeros, part in (
        ("gpt2", FOUR_BITS, [], "GPT2LMHeadModel has no layers of the class Linear"),
        ("gpt2", LoraOptions(load_in_4bit=True), [], "needs --lora_rank above 0"),
        ("gpt2", FOUR_BITS, [stage_3], "allowed: stage 0, 1 or 2"),
    ):
        with pytest.raises(UserError, match=f"^--load_in_4bit: .*{part}"):
            check_adapters(str(tmp_path / path), options, *zeros)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.model.nf4.find_spec", lambda _: None)
    with pytest.raises(UserError, match="^--load_in_4bit: bitsandbytes is not installed: .*-qlora.txt"):
        check_adapters("", FOUR_BITS)

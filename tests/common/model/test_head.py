"""The output head in chunks, against all logits at once."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GraniteConfig, PretrainedConfig, PreTrainedModel

from common.model import head, linear_head
from common.model.forward import label_pass
from common.model.head import Entropy, Targets, in_chunks
from common.numeric.top_k_top_p import Support
from tests.conftest import assert_close
from tests.end_to_end.test_families import COMPLETE, GROUPED, POLICIES

TOKENS, HIDDEN, ROWS, COUNT = 11, 8, 40, 37  # the last three ids cannot be sampled
TEMPERATURE = 0.7


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def plain(logits: Tensor, targets: Targets, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies in fp64, one softmax over all tokens that can be sampled."""
    logits = logits.double()[:, : targets.num_tokens] / targets.temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    terms = torch.where(probabilities > 0, probabilities * probabilities.clamp(min=1e-300).log(), 0.0)
    entropies = -(probabilities**2).sum(1).log() if targets.entropy == "collision" else -terms.sum(1)
    return probabilities[range(len(logits)), targets.labels].log(), entropies


@pytest.mark.parametrize("kind", ["none", "value", "differentiable", "collision"])
@pytest.mark.parametrize("is_restricted", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int, is_restricted: bool, kind: Entropy
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk * ROWS + ROWS // 2)
    states, linear = random(TOKENS, HIDDEN).requires_grad_(), nn.Linear(HIDDEN, ROWS)
    labels, allowed = torch.arange(TOKENS) % COUNT, random(TOKENS, COUNT) > 0
    allowed[range(TOKENS), labels] = True
    targets = Targets(
        labels,
        TEMPERATURE,
        COUNT,
        Support(allowed.sum(1), allowed.nonzero()[:, 1]) if is_restricted else None,
        kind,
    )
    expected = plain(linear(states), targets, allowed if is_restricted else None)
    sizes, compute = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *x: sizes.append(len(x[0])) or compute(*x))
    result = in_chunks(linear, states, targets)
    assert sum(sizes) == TOKENS and max(sizes) == min(chunk, TOKENS)
    assert_close(result[0], expected[0].float())
    assert_close(result[1], (expected[1] if kind != "none" else 0 * expected[1]).float())
    weights = random(2, TOKENS)
    inputs = states, linear.weight, linear.bias
    loss = (weights * result).sum()
    counted = weights * torch.tensor([[1.0], [kind == "differentiable"]])
    expected_loss = (counted * torch.stack(expected)).sum()
    for one, other in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected_loss, inputs), strict=True
    ):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


class OtherLinear(nn.Linear):
    """A head with a forward pass of its own, such as one with adapters."""


@pytest.mark.parametrize("kind", [nn.Linear, OtherLinear])
def test_logits_of_one_chunk_are_in_memory(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Linear]) -> None:
    """Of each chunk, the graph keeps states and labels alone."""
    monkeypatch.setattr(head, "CHUNK", 2 * ROWS)
    linear, saved = kind(HIDDEN, ROWS), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        in_chunks(linear, random(TOKENS, HIDDEN), Targets(torch.arange(TOKENS)))
    assert saved and not any(ROWS in shape[1:] for shape in saved)


class MatrixProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        aten = torch.ops.aten
        self.count += function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_)
        return function(*args, **(kwargs or {}))


def passes(linear: nn.Linear, targets: Targets, slopes: Tensor) -> tuple[Tensor, list[Tensor], float]:
    """Log-probabilities, gradients of states and trained weights, and matrix products of each of 3 chunks."""
    states = random(TOKENS, HIDDEN).to(linear.weight.dtype).requires_grad_()
    with MatrixProducts() as products:
        logprobs = in_chunks(linear, states, targets)[0]
        logprobs.backward(slopes)
    gradients = [states.grad, *(p.grad for p in linear.parameters() if p.requires_grad)]
    return logprobs, gradients, products.count / 3


@pytest.mark.parametrize(
    ("kind", "is_frozen", "is_summed", "products"),
    [(nn.Linear, False, True, 3), (nn.Linear, False, False, 4), (nn.Linear, True, True, 2)]
    + [(nn.Linear, True, False, 3), (OtherLinear, False, True, 4)],
)
def test_matrix_products_of_a_loss(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Linear], is_frozen: bool, is_summed: bool, products: int
) -> None:
    """A sum takes those of a head without chunks: logits, gradients of states and of weights."""
    monkeypatch.setattr(head, "CHUNK", 4 * ROWS)
    linear, labels, slopes = kind(HIDDEN, ROWS), torch.arange(TOKENS), torch.full((TOKENS,), -0.3)
    linear.requires_grad_(not is_frozen)
    states = random(TOKENS, HIDDEN).requires_grad_()
    expected = plain(linear(states), Targets(labels), None)[0]
    inputs = states, *(p for p in linear.parameters() if p.requires_grad)
    gradients = torch.autograd.grad(expected, inputs, slopes.double())
    logprobs, results, counted = passes(linear, Targets(labels, is_summed=is_summed), slopes)
    assert_close(logprobs, expected.float())
    for one, other in zip(results, gradients, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert counted == products


def test_a_loss_that_is_no_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients would be wrong, and are NaN."""
    monkeypatch.setattr(head, "CHUNK", 4 * ROWS)
    targets = Targets(torch.arange(TOKENS), is_summed=True)
    _, gradients, _ = passes(nn.Linear(HIDDEN, ROWS), targets, torch.arange(TOKENS).float())
    assert all(gradient.isnan().all() for gradient in gradients)


@pytest.mark.parametrize(("dtype", "products"), [(torch.bfloat16, 3), (torch.float16, 4)])
def test_a_sum_in_16_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, products: int) -> None:
    """The loss has 32 bits. In fp16, gradients are computed once they are scaled."""
    monkeypatch.setattr(head, "CHUNK", 4 * ROWS)
    linear, targets = nn.Linear(HIDDEN, ROWS, dtype=dtype), Targets(torch.arange(TOKENS), is_summed=True)
    logprobs, gradients, counted = passes(linear, targets, torch.full((TOKENS,), -1000.0))
    assert logprobs.dtype == torch.float32 and counted == products
    monkeypatch.setattr(head, "CHUNK", TOKENS * ROWS)
    linear.zero_grad()
    expected, others, _ = passes(linear, targets, torch.full((TOKENS,), -1000.0))
    assert_close(logprobs, expected)
    for one, other in zip(gradients, others, strict=True):
        assert_close(one, other, rtol=0.05, atol=10.0)


@pytest.mark.parametrize("chunk", [4, TOKENS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_not_rounded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    """Log-probabilities are those of fp64 from the same factors; gradients have the precision of these."""
    monkeypatch.setattr(head, "CHUNK", chunk * ROWS)
    monkeypatch.setattr(linear_head, "WIDENED", 7 * HIDDEN)
    linear = nn.Linear(HIDDEN, ROWS, dtype=dtype)
    states = (40 * random(TOKENS, HIDDEN)).to(dtype).requires_grad_()
    targets = Targets(torch.arange(TOKENS), TEMPERATURE)
    result = in_chunks(linear, states, targets)
    wide = [one.detach().double().requires_grad_() for one in (states, linear.weight, linear.bias)]
    expected = plain(nn.functional.linear(*wide), targets, None)[0]
    assert_close(result[0], expected.float(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_close(in_chunks(linear, states, targets)[0], result[0])
    result[0].mean().backward()
    expected.mean().backward()
    for one, other in zip((states, linear.weight, linear.bias), wide, strict=True):
        assert one.grad.dtype == dtype
        assert_close(one.grad.double(), other.grad, rtol=0.02, atol=0.02 * other.grad.abs().max().item())


def test_no_labels() -> None:
    states = random(0, HIDDEN).requires_grad_()
    result = in_chunks(nn.Linear(HIDDEN, ROWS), states, Targets(torch.zeros(0).long()))
    assert result.shape == (2, 0)
    result.sum().backward()


FAMILIES: dict[str, PretrainedConfig] = COMPLETE | POLICIES | {
    "granite": GraniteConfig(**GROUPED, logits_scaling=4.0)
}  # fmt: skip
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
IS_LABEL = torch.arange(9) >= torch.tensor([[4], [1], [7]])
POSITIONS = IS_LABEL.roll(-1, dims=1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 4 * 60)


def build(name: str) -> PreTrainedModel:
    config = FAMILIES[name]
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = 60, 0, 1, 2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def check(model: nn.Module, trained: PreTrainedModel) -> None:
    """Values and gradients of `label_pass`, against transformers' own logits."""
    parameters = [p for p in trained.parameters() if p.requires_grad]
    expected, _ = plain(
        model(input_ids=IDS, use_cache=False).logits[POSITIONS], Targets(IDS[IS_LABEL], TEMPERATURE), None
    )
    gradients = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    for is_summed in (False, True):  # the first pass also checks the head
        targets = Targets(IDS[IS_LABEL], TEMPERATURE, is_summed=is_summed)
        logprobs = label_pass(model, IDS, POSITIONS, targets).logprobs
        assert_close(logprobs, expected.float(), rtol=1e-5, atol=1e-5)
        for one, other in zip(
            torch.autograd.grad(logprobs.sum(), parameters, allow_unused=True), gradients, strict=True
        ):
            if other is not None:
                assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    model = build(name)
    check(model, model)
    assert not model.has_own_logits


def test_a_family_that_changes_logits_in_its_own_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(head, "adjust_logits", lambda _, logits: logits)
    model = build("gemma2")
    check(model, model)
    assert model.has_own_logits
    assert capsys.readouterr().out.count("model type 'gemma2' changes its logits") == 1


def test_adapters_on_the_head() -> None:
    model = peft.get_peft_model(
        build("cohere"), peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    )
    check(model, model.get_base_model())
    assert not model.get_base_model().has_own_logits

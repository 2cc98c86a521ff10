"""Batches without padding: the numbers of padded ones under `sdpa`, with attention that takes lengths."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common.model.families import remove_noise
from common.model.forward import label_pass, response_logits, token_scores_and_states
from common.model.head import Targets
from common.training.expert_use import ExpertUse
from tests.conftest import assert_close
from tests.end_to_end.test_families import COMPLETE, POLICIES

UNPADDED = [
    "llama",
    "qwen2",
    "qwen3_moe",
    "mistral",
    "gemma3_text",
    "gemma3",
    "gpt2",
    "opt",
    "phi3",
    "mixtral",
]
PADDED = ["mamba", "qwen3_next"]  # recurrent states
FAMILIES: dict[str, PretrainedConfig] = COMPLETE | POLICIES
VOCABULARY, PAD = 60, 0
IDS = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([[11], [20], [3]])
IS_TOKEN = torch.arange(20) < LENGTHS
IDS = torch.where(IS_TOKEN, IDS, PAD)
IS_LABEL = IS_TOKEN & (torch.arange(20) >= torch.tensor([[4], [12], [1]]))
IS_LAST = torch.arange(20) == LENGTHS - 1
# Two documents on a row, and one.
PACKED = torch.tensor([[*range(7), *range(13)], [*range(12), *[0] * 8]])
IS_PACKED_LABEL = (PACKED > 0) & (torch.arange(20) < torch.tensor([[18], [12]]))


def attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention within each sequence of a row, in the form that flash attention has in transformers."""
    assert attention_mask is None
    tokens, heads = query.shape[2], query.shape[1]
    boundaries = [0, tokens] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    assert boundaries[0] == 0 and boundaries[-1] == tokens
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    index = torch.arange(tokens)
    sequence = torch.searchsorted(torch.tensor(boundaries[1:]), index, right=True)
    distance = index[:, None] - index
    sees = (sequence[:, None] == sequence) & (distance >= 0) & (distance < (sliding_window or tokens))
    weights = logits.masked_fill(~sees, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def build(name: str, kind: Any = AutoModelForCausalLM) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with `sdpa`, and one of the same weights whose attention takes lengths."""
    config = copy.deepcopy(FAMILIES[name])
    remove_noise(config)
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id, text.bos_token_id, text.eos_token_id = VOCABULARY, PAD, 1, 2
    config.num_labels, config.pad_token_id = 1, PAD
    torch.manual_seed(0)
    plain = kind.from_config(config).eval()
    model = copy.deepcopy(plain)
    model.config._attn_implementation = "flash_attention_2"
    return plain, model


@pytest.fixture(autouse=True)
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of each call of attention in a forward pass with lengths."""
    seen = []

    def watched(module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
        if options.get("cu_seq_lens_q") is not None:
            seen.append((query.shape[0], query.shape[2]))
        return attention(module, query, *rest, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", watched)
    return seen


def logprobs_of(model: nn.Module, position_ids: Tensor | None = None) -> Tensor:
    ids, is_label = (IDS[:2], IS_PACKED_LABEL) if position_ids is not None else (IDS, IS_LABEL)
    positions = is_label.roll(-1, dims=1)
    return label_pass(model, ids, positions, Targets(ids[is_label]), position_ids).logprobs


def plain_logprobs(model: nn.Module, position_ids: Tensor | None = None) -> Tensor:
    """From all logits of padded rows."""
    ids, is_label = (IDS[:2], IS_PACKED_LABEL) if position_ids is not None else (IDS, IS_LABEL)
    layout = {} if position_ids is None else {"position_ids": position_ids}
    logits = model(input_ids=ids, use_cache=False, **layout).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, ids[:, 1:, None])[..., 0][is_label[:, 1:]]


def check(plain: nn.Module, model: nn.Module, expect: Callable, compute: Callable) -> None:
    """Compare values, and the gradients of all trained weights under unlike slopes."""
    expected, values = expect(plain), compute(model)
    assert_close(values, expected, rtol=1e-5, atol=1e-5)
    slopes = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    trained = [[p for p in one.parameters() if p.requires_grad] for one in (plain, model)]
    assert trained[0]
    for one, other in zip(
        torch.autograd.grad(expected, trained[0], slopes, allow_unused=True),
        torch.autograd.grad(values, trained[1], slopes, allow_unused=True),
        strict=True,
    ):
        if one is not None or other is not None:
            assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNPADDED)
def test_logprobs(name: str, shapes: list[tuple[int, int]]) -> None:
    """The last token of a row is read by no state that counts, but is a label of the load-balancing loss."""
    plain, model = build(name)
    check(plain, model, plain_logprobs, logprobs_of)
    assert shapes.pop() == (1, int(LENGTHS.sum()) - (0 if name == "mixtral" else 3))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_packed_rows(name: str, shapes: list[tuple[int, int]]) -> None:
    plain, model = build(name)
    check(plain, model, lambda m: plain_logprobs(m, PACKED), lambda m: logprobs_of(m, PACKED))
    assert shapes.pop() == (1, 17 + 11)


@pytest.mark.parametrize("wrap", ["checkpointing", "lora"])
def test_training(wrap: str, shapes: list[tuple[int, int]]) -> None:
    plain, model = build("qwen2")
    if wrap == "checkpointing":
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        adapters = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        plain = peft.get_peft_model(plain, adapters)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, adapters)
    check(plain, model, plain_logprobs, logprobs_of)
    assert len(shapes) == 2 * (3 if wrap == "checkpointing" else 2)  # the check of the model is one pass


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_scores_and_states(name: str, shapes: list[tuple[int, int]]) -> None:
    plain, model = (one.double() for one in build(name, AutoModelForSequenceClassification))

    def expect(one: PreTrainedModel) -> Tensor:
        states = one.model(input_ids=IDS, use_cache=False).last_hidden_state
        return torch.cat([one.score(states)[IS_LAST].flatten(), states[IS_TOKEN].flatten()])

    def compute(one: PreTrainedModel) -> Tensor:
        scores, states = token_scores_and_states(one, IDS, IS_LAST)
        return torch.cat([scores, states[IS_TOKEN].flatten()])

    check(plain, model, expect, compute)
    assert shapes.pop() == (1, int(LENGTHS.sum()))


def test_positions_in_any_order() -> None:
    """As rows and columns, one twice."""
    plain, model = build("llama")
    index = torch.tensor([2, 0, 1, 0]), torch.tensor([1, 5, 19, 5])
    check(
        plain, model, lambda one: one(input_ids=IDS).logits[index],
        lambda one: response_logits(one, IDS, index),
    )  # fmt: skip


def test_no_positions() -> None:
    """A rank without rows may have none."""
    _, model = build("llama")
    nothing = torch.zeros_like(IDS, dtype=torch.bool)
    assert label_pass(model, IDS, nothing, Targets(IDS[nothing])).logprobs.shape == (0,)


def test_balance_loss() -> None:
    plain, model = build("mixtral")
    for one in (plain, model):
        one.train()
    assert isinstance(FAMILIES["mixtral"], MixtralConfig)
    positions = IS_LABEL.roll(-1, dims=1)
    losses = []
    for one in (plain, model):
        experts = ExpertUse(one, label_pass, [None])
        label_pass(one, IDS, positions, Targets(IDS[IS_LABEL]))
        losses.append(experts.loss())
    assert losses[0] > 0
    assert_close(losses[1], losses[0])


@pytest.mark.parametrize("name", PADDED)
def test_models_that_need_padding(
    name: str, shapes: list[tuple[int, int]], capsys: pytest.CaptureFixture
) -> None:
    plain, model = build(name)
    logprobs_of(model)  # checks the model
    shapes.clear()
    check(plain, model, plain_logprobs, logprobs_of)
    assert not shapes and capsys.readouterr().out.count("cannot do without padding: rows are padded") == 1


def test_chunked_attention_needs_padding(shapes: list[tuple[int, int]]) -> None:
    _, model = build("llama")
    model.config.attention_chunk_size = 64
    logprobs_of(model)
    assert not shapes

"""Which models can encode responses that share a prompt, and the layout of such rows."""

import copy
from functools import cache

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

from common.model import shared_prompt
from common.model.shared_prompt import (
    Sharing,
    can_share_prompts,
    last_of_segments,
    layout_inputs,
    pad_shared_rows,
    responses_per_row,
    shared_row,
    wants_sharing,
    with_common_prompt,
    work,
)

PAD, VOCABULARY = 0, 50
GENERAL = {
    "vocab_size": VOCABULARY, "num_labels": 1, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
SHAPE = GENERAL | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama, eager": LlamaConfig(**SHAPE, attn_implementation="eager"),
    "gpt2": GPT2Config(**GENERAL, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "opt": OPTConfig(
        **GENERAL, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.3,
    ),
    "wide window": MistralConfig(**SHAPE, sliding_window=32),
    "mixture": MixtralConfig(**SHAPE, **MIXTURE, sliding_window=None),
    "balanced mixture": MixtralConfig(**SHAPE, **MIXTURE, sliding_window=None, output_router_logits=True),
    "narrow window": MistralConfig(**SHAPE, sliding_window=8),
    "alibi": BloomConfig(**GENERAL, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "flash": LlamaConfig(**SHAPE),
}  # fmt: skip
CANNOT = ("narrow window", "alibi", "flash", "balanced mixture")
TWO, THREE = Sharing(2, 12, 12), Sharing(3, 10, 7)


@cache
def make(name: str, dtype: torch.dtype = torch.double, *, is_scalar: bool = True) -> torch.nn.Module:
    """An untrained model; double precision makes rounding negligible."""
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    model = kind.from_config(copy.deepcopy(CONFIGS[name])).to(dtype).eval()
    if is_scalar:
        torch.nn.init.normal_(model.score.weight)
    return model


class Wrapped(torch.nn.Module):
    """A model in an engine, which may change its inputs or fail."""

    def __init__(self, error: Exception | None = None, **replaced: None) -> None:
        super().__init__()
        self.module, self.error, self.replaced = make("llama", torch.float), error, replaced

    def forward(self, **inputs: torch.Tensor) -> object:
        if self.error and inputs.keys() > {"input_ids", "use_cache"}:
            raise self.error
        return self.module(**(inputs | self.replaced))


@pytest.mark.parametrize("is_scalar", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_cannot_share_prompts_are_detected(name: str, is_scalar: bool) -> None:
    model = make(name, torch.float, is_scalar=is_scalar)
    if name == "flash":
        model.config._attn_implementation = (
            "flash_attention_2"  # refused by name: the kernels are not installed
        )
    can = name not in CANNOT
    assert [can_share_prompts(model, sharing) for sharing in (TWO, THREE)] == [can, can]


def test_a_critic_without_scores_yet_is_detected() -> None:
    """Its head is zero, so that all scores are equal."""
    model = AutoModelForSequenceClassification.from_config(CONFIGS["narrow window"]).eval()
    torch.nn.init.zeros_(model.score.weight)
    assert not can_share_prompts(model, TWO)


def test_a_model_that_ignores_inputs_is_detected() -> None:
    assert can_share_prompts(Wrapped(), TWO)
    assert not can_share_prompts(Wrapped(position_ids=None), TWO)
    assert not can_share_prompts(Wrapped(attention_mask=None), TWO)


@pytest.mark.parametrize("error", [TypeError("unexpected"), ValueError("no"), RuntimeError("sizes")])
def test_a_model_that_rejects_such_rows_is_detected(error: Exception) -> None:
    model = Wrapped(error).train()
    assert not can_share_prompts(model, TWO) and model.training
    assert responses_per_row(model, TWO) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[gloo] peer")])
def test_other_failures_end_the_run(error: Exception) -> None:
    with pytest.raises(type(error)):
        can_share_prompts(Wrapped(error), TWO)


def test_all_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompt, "sum_over_ranks", lambda *_: [1.0])
    monkeypatch.setattr(shared_prompt, "world_size", lambda: 2)
    assert not can_share_prompts(Wrapped(), TWO)


def test_positions_and_segments_of_a_row() -> None:
    row = shared_row([5, 6], [[7], [8, 9, 10]])
    assert row == ([5, 6, 7, 8, 9, 10], [0, 1, 2, 2, 3, 4], [0, 0, 1, 2, 2, 2])
    _, _, segments = pad_shared_rows([row, shared_row([5], [[6]])], PAD)
    assert segments.tolist() == [[0, 0, 1, 2, 2, 2], [0, 1, -1, -1, -1, -1]]
    assert last_of_segments(segments).int().tolist() == [[0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]


def test_a_token_sees_the_prompt_and_its_own_response() -> None:
    """Padding sees the prompt alone."""
    mask = layout_inputs(make("llama"), torch.zeros(1, 5), torch.tensor([[0, 1, 2, 2, -1]]))["attention_mask"]
    sees = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 1]]
    assert mask.shape == (1, 1, 5, 5) and (mask == 0).int()[0, 0].tolist() == sees
    assert mask.min() == torch.finfo(torch.double).min


def test_the_common_prompt_of_texts_leaves_each_its_last_token() -> None:
    assert with_common_prompt([[1, 2, 3], [1, 2, 4, 5]]) == shared_row([1, 2], [[3], [4, 5]])
    assert with_common_prompt([[1, 2, 3], [1, 2, 3]]) == shared_row([1, 2], [[3], [3]])
    assert with_common_prompt([[1, 2], [1, 2, 3]]) == shared_row([1], [[2], [2, 3]])
    assert with_common_prompt([[1, 2, 3]]) == shared_row([1, 2], [[3]])
    assert with_common_prompt([[1, 2], [3, 4]]) == shared_row([], [[1, 2], [3, 4]])


def test_work_of_layouts() -> None:
    assert work([(1, 19)], 8, is_shared=True) == 19 * (12 * 8 + 2 * 19)
    assert work([(3, 14), (1, 2)], 8, is_shared=False) == 3 * 14 * (12 * 8 + 14) + 2 * (12 * 8 + 2)
    assert [wants_sharing(how, 5, 4) for how in ("auto", "yes", "no")] == [True, True, False]
    assert [wants_sharing(how, 5, 5) for how in ("auto", "yes", "no")] == [False, True, False]

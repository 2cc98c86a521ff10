"""The `varlen` attention kernels. Without a GPU, torch's kernel is replaced by plain attention."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from common.model import varlen_attention
from common.model.forward import label_pass
from common.model.head import Targets
from tests.common.model.test_unpadded import (
    IDS,
    IS_LABEL,
    IS_TOKEN,
    attention,
    build,
    check,
    logprobs_of,
    plain_logprobs,
)
from tests.conftest import assert_close


def plain_kernel(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, longest: int,
    longest_key: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """In place of `torch.nn.attention.varlen.varlen_attn`: (tokens, heads, head size)."""
    assert key_starts is starts and longest_key == longest == int(starts.diff().max()) and enable_gqa
    before, after = window_size
    assert after == 0
    parts = (part.transpose(0, 1)[None] for part in (query, key, value))
    window = None if before == -1 else before + 1
    return attention(None, *parts, None, scaling=scale, sliding_window=window, cu_seq_lens_q=starts)[0][0]


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain, model = (one.to(dtype) for one in build(name))
    plain.set_attn_implementation("eager")
    model.config._attn_implementation = "sdpa"
    return plain, model


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, "sdpa", mapping["sdpa"])
    varlen_attention.register()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_numbers_of_sdpa(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls = []
    monkeypatch.setattr(
        varlen_attention, "varlen_attn", lambda *x, **y: calls.append(len(x[0])) or plain_kernel(*x, **y)
    )
    plain, model = make(name)
    check(plain, model, plain_logprobs, logprobs_of)
    assert calls[-1] == int(IS_TOKEN.sum()) - 3


def test_other_rows_have_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation, and rows whose responses share a prompt."""
    monkeypatch.delattr(varlen_attention, "varlen_attn")
    plain, model = make("llama")
    mask = IS_TOKEN.flip(1).long()
    texts = [
        one.generate(IDS.flip(1), attention_mask=mask, max_new_tokens=8, do_sample=False)
        for one in (plain, model)
    ]
    assert texts[0].tolist() == texts[1].tolist()
    is_seen = torch.ones(20, 20).tril().bool()
    is_seen[15:, 4:9] = False
    mask = torch.where(is_seen, 0.0, torch.finfo(torch.float32).min).expand(3, 1, 20, 20)
    positions, targets = IS_LABEL.roll(-1, dims=1), Targets(IDS[IS_LABEL])
    logprobs = [
        label_pass(one, IDS, positions, targets, attention_mask=mask).logprobs for one in (plain, model)
    ]
    assert_close(logprobs[1], logprobs[0])


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_what_the_kernel_lacks_needs_padding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    """Weights of 32 bits, and models that call other kernels."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    monkeypatch.setattr(varlen_attention, "varlen_attn", refuse if name == "llama" else plain_kernel)
    plain, model = make(name)
    check(plain, model, plain_logprobs, logprobs_of)
    assert "cannot do without padding" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_kernel_on_a_gpu(name: str) -> None:
    with torch.device("cuda"):
        plain, model = make(name, torch.bfloat16)
        ids, is_label = IDS.cuda(), IS_LABEL.cuda()
        positions, targets = is_label.roll(-1, dims=1), Targets(ids[is_label])
        logprobs = [label_pass(one.cuda(), ids, positions, targets).logprobs for one in (plain, model)]
    assert model.can_unpad
    assert_close(logprobs[1], logprobs[0], rtol=0.05, atol=0.05)

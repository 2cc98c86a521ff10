"""Draw responses with `transformers.generate`, the same ones for any number of ranks and any batch size."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from common.support import pack, restrict, support
from common.tensor_ops import scaled


class Responses(NamedTuple):
    """Sampled tokens, padded on the right, and the log-probability with which each was drawn."""

    ids: Tensor  # (B, R)
    lengths: Tensor  # (B,) with EOS, if there is one
    ended: Tensor  # (B,) bool: stopped by EOS rather than by the length limit
    logprobs: Tensor  # (B, R) under softmax(logits / temperature) of what may be drawn, 0 after the end
    support: Tensor  # (B, R, V / 8) uint8: what that was, packed; (B, R, 0) where every token may be drawn


class InverseTransformSampler(LogitsProcessor):
    """Chooses each token by one uniform number per row and position, instead of by a shared random stream.

    The token is the first whose cumulative probability exceeds the number, so a row's response depends on its
    own numbers alone: not on its neighbours, the batch size or the rank. `generate` then takes the argmax of
    what this returns. Log-probabilities come at no cost; they are those with which tokens are drawn, also
    when top_k or top_p leaves tokens out.
    """

    def __init__(self, uniforms: Tensor, temperature: float, top_p: float, top_k: int) -> None:
        self._uniforms, self._temperature, self._top_p, self._top_k = uniforms, temperature, top_p, top_k
        self.logprobs: list[Tensor] = []  # (B,) of each step
        self.supports: list[Tensor] = []  # (B, V / 8) or (B, 0) of each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the library's signature
        logits = scaled(scores, self._temperature)  # (B, V)
        packed = torch.empty(len(scores), 0, dtype=torch.uint8, device=scores.device)
        if self._top_p < 1.0 or self._top_k:
            packed = pack(support(logits.softmax(-1), self._top_k, self._top_p))
        self.supports.append(packed)
        logprobs = restrict(logits, packed).log_softmax(-1)
        cumulative = logprobs.exp().cumsum(-1)
        target = self._uniforms[:, len(self.logprobs), None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[-1] - 1)  # (B, 1)
        self.logprobs.append(logprobs.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


def uniforms_for(seed: int, step: int, rows: Sequence[int], length: int) -> Tensor:
    """Uniform numbers (B, length) in [0, 1): a function of seed, step and the row's number."""
    streams = [np.random.default_rng((seed, 3, step, row)).random(length, dtype=np.float32) for row in rows]
    return torch.from_numpy(np.stack(streams))


@torch.no_grad()
def sample_responses(
    model: nn.Module, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float, top_p: float,
    eos_token_id: int, pad_token_id: int, synced: bool, top_k: int = 0,
) -> Responses:  # fmt: skip
    """Responses of at most R tokens; uniforms (B, R). synced: every rank runs all R forwards."""
    device, longest = uniforms.device, max(map(len, prompts))
    input_ids = torch.tensor(
        [[pad_token_id] * (longest - len(p)) + p for p in prompts], device=device
    )  # (B, P)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    attention_mask = torch.arange(longest, device=device) >= longest - lengths[:, None]  # (B, P)
    sampler = InverseTransformSampler(uniforms, temperature, top_p, top_k)
    limit = uniforms.shape[1]
    # A model's own generation defaults (penalties, minimal lengths) would change what is sampled.
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        whole = model.generate(
            input_ids,
            attention_mask=attention_mask.long(),
            generation_config=GenerationConfig(
                max_new_tokens=limit, do_sample=False, eos_token_id=eos_token_id, pad_token_id=pad_token_id
            ),
            logits_processor=LogitsProcessorList([sampler]),
            synced_gpus=synced,
        )
    finally:
        model.generation_config = defaults
    logprobs, supports = torch.stack(sampler.logprobs, dim=1), torch.stack(sampler.supports, dim=1)
    return _cut(whole[:, longest:], logprobs, supports, limit, eos_token_id, pad_token_id)


def _cut(
    sampled: Tensor, logprobs: Tensor, supports: Tensor, limit: int, eos_token_id: int, pad_token_id: int
) -> Responses:
    """End each row at its first EOS and widen everything to `limit` columns."""
    steps = sampled.shape[1]
    is_eos = sampled == eos_token_id  # (B, steps)
    ended = is_eos.any(1)
    lengths = torch.where(ended, is_eos.int().argmax(1) + 1, steps)
    mask = torch.arange(limit, device=sampled.device) < lengths[:, None]  # (B, R)
    widen = (0, limit - steps)
    ids = nn.functional.pad(sampled, widen, value=pad_token_id).masked_fill(~mask, pad_token_id)
    logprobs = nn.functional.pad(logprobs[:, :steps], widen).masked_fill(~mask, 0.0)
    supports = nn.functional.pad(supports[:, :steps], (0, 0, *widen)).masked_fill(~mask[..., None], 0)
    return Responses(ids, lengths, ended, logprobs, supports)

"""Scores of a micro-batch of responses, with each prompt encoded once for all its responses.

A shared row holds a prompt and all its responses. The position ids of each response continue from the prompt,
and a mask hides the responses from each other. Models that cannot do so get one row per response.
"""

from collections.abc import Sequence
from typing import assert_never

import numpy as np
import torch
from torch import Tensor, nn

from common.model.engine_protocol import Engine
from common.model.forward import base_model, pad_token_id, token_scores_and_states
from common.runtime.distributed import log
from common.text.transformers_internals import attention_implementation
from step2_reward.data import Batch, Layout, Preference, collate
from step2_reward.options import RewardOptions

SAMPLE = 1000  # records from which the layout is chosen


def pair_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Score the better and the worse response of each pair, (P,) each, in one forward pass."""
    return pair_scores_and_states(model, batch)[:2]


def pair_scores_and_states(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Like `pair_scores`; also return the hidden states (R, T, hidden size)."""
    after = torch.nn.functional.pad(batch.segments[:, 1:], (0, 1), value=-1)  # (R, T)
    is_last = (batch.segments > 0) & (batch.segments != after)
    scores, states = _scores_at(model, batch, is_last)  # (N,)
    return scores[batch.better], scores[batch.worse], states


def choose_layout(engine: Engine, rows: Sequence[Preference], options: RewardOptions) -> Layout:
    """Choose the layout by --share_prompts and the first rows, and log it.

    At ZeRO-3 every rank must call this.
    """
    separate, shared = (Layout(pad_token_id(engine), share_prompts) for share_prompts in (False, True))
    sample = [rows[i] for i in range(min(len(rows), SAMPLE))]
    width = base_model(engine).config.get_text_config().hidden_size
    how, layout = "for each response", separate
    match options.share_prompts:
        case "no":
            wants_shared = False
        case "yes":
            wants_shared = True
        case "auto":
            wants_shared = work(sample, separate, width) > work(sample, shared, width)
            how += ", which is less work"
        case _:
            assert_never(options.share_prompts)
    if wants_shared and can_share_prompts(engine, options.max_length):
        how, layout = "once for all its responses", shared
    elif wants_shared:
        how = "for each response, because this model cannot share prompts"
    tokens, separate_tokens = tokens_per_pair(sample, layout)
    log(f"each prompt is encoded {how}: {tokens:.0f} tokens per pair (separate pairs: {separate_tokens:.0f})")
    return layout


def tokens_per_pair(rows: Sequence[Preference], layout: Layout) -> tuple[float, float]:
    """Count encoded tokens per pair, in this layout and with every pair encoded separately."""
    encoded = sum(sum(layout.row_lengths(row)) for row in rows)
    separate = sum((len(row.ranks) - 1) * sum(Layout(0).row_lengths(row)) for row in rows)
    pairs = sum(len(row.pairs) for row in rows)
    return encoded / pairs, separate / pairs


def work(rows: Sequence[Preference], layout: Layout, width: int) -> int:
    """Estimate multiplications per layer and unit of width, to compare layouts.

    Each token takes 12 width^2 in matrices (Kaplan et al. 2020, 2.1) and 2 width per token of its row in
    attention. Kernels skip half of a causal mask, but nothing of other masks. The rows of a record are padded
    to the longest.
    """
    per_token = 2 if layout.share_prompts else 1
    return sum(k * (12 * width * n + per_token * n**2) for k, n in layout.shapes(rows))


@torch.no_grad()
def can_share_prompts(engine: Engine, max_length: int) -> bool:
    """Check that the model scores responses that share a prompt as it scores them separately.

    It fails for attention kernels without masks, position encodings that ignore `position_ids`, and sliding
    windows. Scores are compared at every position of random tokens of the maximum length.
    """
    model = base_model(engine)
    if attention_implementation(model.config) not in ("eager", "sdpa"):
        return False
    half, vocabulary = max_length // 2, model.config.get_text_config().vocab_size
    noise = np.random.default_rng(0).integers(vocabulary, size=3 * half).tolist()
    row = Preference(noise[:half], noise[half:], [half, half], [0.0, 1.0])
    engine.eval()
    try:
        separate, shared = (
            _scores_at(engine, batch, batch.segments > 0)[0]
            for batch in (collate([row], Layout(pad_token_id(engine), share)) for share in (False, True))
        )  # (2 half,) each
    except (TypeError, ValueError, RuntimeError):  # the model rejects such input
        return False
    finally:
        engine.train()
    # The order of summation differs, so only half of the digits must agree.
    return bool((separate - shared).norm() <= torch.finfo(model.dtype).eps ** 0.5 * separate.norm())


def prompt_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask of shared rows: segments (R, T) -> (R, 1, T, T) of `dtype`.

    A token attends to itself and to earlier tokens of the prompt and of its own segment.
    """
    width = segments.shape[1]
    is_causal = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    key, query = segments.unsqueeze(1), segments.unsqueeze(2)  # (R, 1, T), (R, T, 1)
    attends = is_causal & ((key == 0) | (key == query))  # (R, T, T)
    mask = torch.zeros(attends.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~attends, torch.finfo(dtype).min).unsqueeze(1)


def _scores_at(model: nn.Module, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores at true positions (R, T), row by row, and all hidden states."""
    if not batch.share_prompts:
        return token_scores_and_states(model, batch.input_ids, positions)
    mask = prompt_mask(batch.segments, base_model(model).dtype)
    layout = {"position_ids": batch.position_ids, "attention_mask": mask}
    return token_scores_and_states(model, batch.input_ids, positions, **layout)

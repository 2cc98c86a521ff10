"""Scores of a micro-batch of responses, with a prompt encoded once for all responses to it.

Such a row holds the prompt, then each response at the positions that it would have alone, and a mask hides
the other responses from it. A model that cannot do so gets each response with a prompt of its own.
"""

from collections.abc import Sequence
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor

from common.model.forward import base_model, token_scores_and_states
from common.runtime.distributed import log
from step2_reward.data import Batch, Layout, Preference, collate
from step2_reward.options import RewardOptions

SAMPLE = 1000  # records that decide


def pair_scores(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores of the better and the worse response of each pair, (P,) each, in one forward pass."""
    return pair_scores_and_states(model, batch)[:2]


def pair_scores_and_states(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_scores`, and the hidden states (R, T, hidden size) behind them."""
    after = torch.nn.functional.pad(batch.segments[:, 1:], (0, 1), value=-1)  # (R, T)
    is_last = (batch.segments > 0) & (batch.segments != after)
    scores, states = _scores_at(model, batch, is_last)  # (N,)
    return scores[batch.better], scores[batch.worse], states


def choose_layout(
    engine: Any, rows: Sequence[Preference], options: RewardOptions, pad_token_id: int
) -> Layout:
    """Whether responses share their prompt, by --share_prompts and the first rows; says what it comes to.

    At ZeRO-3 every rank must call this.
    """
    alone, shared = (Layout(pad_token_id, share_prompts) for share_prompts in (False, True))
    sample = [rows[i] for i in range(min(len(rows), SAMPLE))]
    width = base_model(engine).config.get_text_config().hidden_size
    how, layout = "for each response", alone
    match options.share_prompts:
        case "no":
            wants_shared = False
        case "yes":
            wants_shared = True
        case "auto":
            wants_shared = work(sample, alone, width) > work(sample, shared, width)
            how += ", which is less work"
        case _:
            assert_never(options.share_prompts)
    if wants_shared and can_share_prompts(engine, options.max_length, pad_token_id):
        how, layout = "for all responses together", shared
    elif wants_shared:
        how = "for each response, as this model needs it"
    tokens, apart = tokens_per_pair(sample, layout)
    log(f"a prompt is encoded {how}: {tokens:.0f} tokens per pair; a pair by itself has {apart:.0f}")
    return layout


def tokens_per_pair(rows: Sequence[Preference], layout: Layout) -> tuple[float, float]:
    """Tokens to encode per pair, and how many they would be with every pair of a record by itself."""
    encoded = sum(sum(layout.row_lengths(row)) for row in rows)
    apart = sum((len(row.ranks) - 1) * sum(Layout(0).row_lengths(row)) for row in rows)
    pairs = sum(len(row.pairs) for row in rows)
    return encoded / pairs, apart / pairs


def work(rows: Sequence[Preference], layout: Layout, width: int) -> int:
    """Multiplications per layer and unit of width to encode these records, for comparison.

    A token takes 12 width^2 in matrices (Kaplan et al. 2020, 2.1) and 2 width with each token of its row in
    attention. Kernels leave out the half of it that a causal mask hides, but nothing of any other mask. The
    rows of a record are padded to the longest of them.
    """
    sizes = [(len(lengths), max(lengths)) for lengths in map(layout.row_lengths, rows)]
    return sum(k * (12 * width * n + (2 if layout.share_prompts else 1) * n**2) for k, n in sizes)


@torch.no_grad()
def can_share_prompts(engine: Any, max_length: int, pad_token_id: int) -> bool:
    """Whether the model scores responses that share a prompt as it scores them alone.

    Not so with attention kernels that take no mask, positions that do not follow `position_ids`, or windows
    that the mask would widen, so it is tried on noise of the greatest length, token by token.
    """
    model = base_model(engine)
    if model.config._attn_implementation not in ("eager", "sdpa"):
        return False
    half, vocabulary = max_length // 2, model.config.get_text_config().vocab_size
    noise = np.random.default_rng(0).integers(vocabulary, size=3 * half).tolist()
    row = Preference(noise[:half], noise[half:], [half, half], [0.0, 1.0])
    engine.eval()
    try:
        alone, shared = (
            _scores_at(engine, batch, batch.segments > 0)[0]
            for batch in (collate([row], Layout(pad_token_id, share)) for share in (False, True))
        )  # (2 half,) each
    except (TypeError, ValueError, RuntimeError):  # it takes no such input
        return False
    finally:
        engine.train()
    # Another order of the same sums: half of the digits agree.
    return bool((alone - shared).norm() <= torch.finfo(model.dtype).eps ** 0.5 * alone.norm())


def prompt_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the attention logits of shared rows: segments (R, T) -> (R, 1, T, T) of `dtype`.

    0 where a token sees another, which comes before it and is of the prompt or of its own segment.
    """
    width = segments.shape[1]
    is_before = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    seen, by = segments.unsqueeze(1), segments.unsqueeze(2)  # (R, 1, T), (R, T, 1)
    sees = is_before & ((seen == 0) | (seen == by))  # (R, T, T)
    hidden = torch.zeros(sees.shape, dtype=dtype, device=segments.device)
    return hidden.masked_fill_(~sees, torch.finfo(dtype).min).unsqueeze(1)


def _scores_at(model: Any, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Scores at true positions (R, T), row by row, and all hidden states."""
    if not batch.share_prompts:
        return token_scores_and_states(model, batch.input_ids, positions)
    mask = prompt_mask(batch.segments, base_model(model).dtype)
    layout = {"position_ids": batch.position_ids, "attention_mask": mask}
    return token_scores_and_states(model, batch.input_ids, positions, **layout)

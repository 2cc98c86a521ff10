"""Scores of a micro-batch of responses, with each prompt encoded once for all its responses."""

from collections.abc import Sequence

from torch import Tensor, nn

from common.model.engine_protocol import Engine
from common.model.forward import base_model, pad_token_id, token_scores_and_states
from common.model.shared_prompt import (
    Sharing,
    can_share_prompts,
    last_of_segments,
    layout_inputs,
    wants_sharing,
    work,
)
from common.runtime.distributed import log
from step2_reward.data import Batch, Layout, Preference
from step2_reward.options import RewardOptions

SAMPLE = 1000  # records from which the layout is chosen


def pair_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Score the better and the worse response of each pair, (P,) each, in one forward pass."""
    return pair_scores_and_states(model, batch)[:2]


def pair_scores_and_states(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Like `pair_scores`; also return the hidden states (R, T, hidden size)."""
    scores, states = _scores_at(model, batch, last_of_segments(batch.segments))  # (N,)
    return scores[batch.better], scores[batch.worse], states


def choose_layout(engine: Engine, rows: Sequence[Preference], options: RewardOptions) -> Layout:
    """Choose the layout by --share_prompts and the first rows, and log it.

    At ZeRO-3 every rank must call this.
    """
    separate, shared = (Layout(pad_token_id(engine), share_prompts) for share_prompts in (False, True))
    sample = [rows[i] for i in range(min(len(rows), SAMPLE))]
    hidden_size = base_model(engine).config.get_text_config().hidden_size
    works = (work(one.shapes(sample), hidden_size, one.share_prompts) for one in (separate, shared))
    how, layout = "for each response", separate
    if wants_sharing(options.share_prompts, *works):
        half = options.max_length // 2
        if can_share_prompts(engine, Sharing(2, half, half)):
            how, layout = "once for all its responses", shared
        else:
            how = "for each response, because this model cannot share prompts"
    elif options.share_prompts == "auto":
        how += ", which is less work"
    tokens, separate_tokens = tokens_per_pair(sample, layout)
    log(f"each prompt is encoded {how}: {tokens:.0f} tokens per pair (separate pairs: {separate_tokens:.0f})")
    return layout


def tokens_per_pair(rows: Sequence[Preference], layout: Layout) -> tuple[float, float]:
    """Count encoded tokens per pair, in this layout and with every pair encoded separately."""
    encoded = sum(sum(layout.row_lengths(row)) for row in rows)
    separate = sum((len(row.ranks) - 1) * sum(Layout(0).row_lengths(row)) for row in rows)
    pairs = sum(len(row.pairs) for row in rows)
    return encoded / pairs, separate / pairs


def _scores_at(model: nn.Module, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores at true positions (R, T), row by row, and all hidden states."""
    if not batch.share_prompts:
        return token_scores_and_states(model, batch.input_ids, positions)
    layout = layout_inputs(model, batch.position_ids, batch.segments)
    return token_scores_and_states(model, batch.input_ids, positions, **layout)

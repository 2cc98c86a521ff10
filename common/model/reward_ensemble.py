"""Reward-model ensembles: options, loading, scoring, aggregation."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, assert_never

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from common.data.batching import Tokens, batches_of_own, rows_of
from common.model.deepspeed_internals import is_partitioned
from common.model.engine import make_frozen
from common.model.families import max_positions
from common.model.forward import base_model, pad_token_id, token_scores
from common.model.loading import load_scalar_model
from common.model.options import EnsembleOptions
from common.model.roles import check_scalar_model
from common.model.shared_prompt import (
    SEPARATE,
    Sharing,
    last_of_segments,
    layout_inputs,
    pad_shared_rows,
    responses_per_row,
    with_common_prompt,
)
from common.model.zero import frozen_config, unpartitioned
from common.runtime.distributed import device
from common.runtime.options import UserError, world_size
from common.runtime.progress import track
from common.text.tokenizer import SegmentEncoder, load_tokenizer


class RewardModel(NamedTuple):
    """A frozen reward model and the encoder for its inputs."""

    encoder: SegmentEncoder
    ready: Callable[[], AbstractContextManager[nn.Module]]  # context manager: the model on its device


def combine_scores(
    scores: Tensor, how: str = "mean", std_coef: float = 1.0, weights: Sequence[float] = ()
) -> Tensor:
    """Aggregate the scores of an ensemble: (M, B) for M members -> (B,).

    how: `mean`; `min`, the worst case; `mean_std`, the mean minus std_coef standard deviations over the
    members (divided by M, not M - 1), which penalises responses on which they disagree. Source: Coste et al.
    2023 (arXiv 2310.02743); their uncertainty-weighted objective subtracts the variance, which does not have
    the unit of the scores. weights: for mean and deviation, normalised; empty: equal.
    """
    weight = scores.new_tensor(weights or [1.0] * len(scores))
    weight = (weight / weight.sum())[:, None]  # (M, 1)
    mean = (weight * scores).sum(0)  # (B,)
    match how:
        case "min":
            return scores.amin(0)
        case "mean":
            return mean
        case "mean_std":
            return mean - std_coef * (weight * (scores - mean) ** 2).sum(0).sqrt()
        case _:
            assert_never(how)


def combine(scores: Tensor, options: EnsembleOptions) -> Tensor:
    """`combine_scores` with the settings of the options."""
    return combine_scores(scores, options.reward_combine, options.reward_std_coef, options.reward_weights)


def load_encoders(options: EnsembleOptions, *known: SegmentEncoder) -> list[SegmentEncoder]:
    """The encoder of each member. Members with the same tokenizer share one, also with `known` encoders.

    Raises UserError unless every member is a reward model, and for --reward_weights or --reward_std_coef that
    do not fit.
    """
    encoders: list[SegmentEncoder] = []
    for path in options.reward_model_name_or_path:
        check_scalar_model(path, "reward_model_name_or_path")
        tokenizer = load_tokenizer(path)
        shared = [e for e in (*known, *encoders) if same_tokenizer(e.tokenizer, tokenizer)]
        encoders.append(shared[0] if shared else SegmentEncoder(tokenizer))
    weights = options.reward_weights
    given = f"--reward_weights {' '.join(f'{weight:g}' for weight in weights)}"
    if weights and (len(weights) != len(encoders) or not all(0 < weight < math.inf for weight in weights)):
        raise UserError(f"{given}: must be {len(encoders)} numbers above 0, one per reward model")
    if weights and options.reward_combine == "min":
        raise UserError(f"{given}: not used by --reward_combine min; allowed: mean mean_std")
    if options.reward_std_coef != EnsembleOptions.reward_std_coef and options.reward_combine != "mean_std":
        raise UserError(
            f"--reward_std_coef {options.reward_std_coef:g}: not used by --reward_combine"
            f" {options.reward_combine}; allowed: mean_std"
        )
    return encoders


def same_tokenizer(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast) -> bool:
    """Whether both tokenizers give the same ids for every text and conversation."""
    return (
        a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str()
        and a.chat_template == b.chat_template
        and (a.eos_token_id, a.bos_token_id) == (b.eos_token_id, b.bos_token_id)
    )


def load_members(
    options: EnsembleOptions, encoders: Sequence[SegmentEncoder], zero: dict[str, Any], offload: bool = False
) -> list[RewardModel]:
    """Load the frozen members, in the precision of a DeepSpeed configuration and partitioned at stage 3.

    offload: keep each member in host memory except during its own forward passes. Ensembles of unpartitioned
    members are always offloaded.
    """
    members: list[RewardModel] = []
    frozen = frozen_config(zero, offload)
    for path, encoder in zip(options.reward_model_name_or_path, encoders, strict=True):
        model = load_scalar_model(path, encoder.tokenizer, frozen or unpartitioned(zero))
        model = make_frozen(model, frozen, offload or len(encoders) > 1)
        members.append(RewardModel(encoder, partial(on_device, model)))
    return members


@contextlib.contextmanager
def on_device(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager: a frozen model with its weights on the device.

    Nothing is copied back, because the host tensors have not changed.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_partitioned(t)]
    host_data = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device(), non_blocking=True)
    try:
        yield model
    finally:
        for tensor, data in zip(tensors, host_data, strict=True):
            tensor.data = data


@torch.no_grad()
def member_scores(
    members: Sequence[RewardModel], inputs: Mapping[SegmentEncoder, Sequence[list[int]]],
    size: int | Tokens, title: str = "", sharing: Sharing = SEPARATE,
) -> Tensor:  # fmt: skip
    """Scores of M members for the same B texts: (M, B) fp32, one member after the other.

    inputs: by encoder, the B texts as token ids that end in EOS, where the score is read. title: of progress
    lines; empty: none. sharing: of the prompts that neighbouring texts begin with.
    """
    scores = []
    for member in members:
        with member.ready() as model:
            scores.append(score_rows(model, inputs[member.encoder], size, title, sharing))
    return torch.stack(scores) if scores else torch.zeros(0)


def score_rows(
    model: nn.Module, rows: Sequence[list[int]], size: int | Tokens, title: str = "",
    sharing: Sharing = SEPARATE,
) -> Tensor:  # fmt: skip
    """Scores (B,) fp32 at the last token of each row, in batches of similar length.

    Rows longer than the model's context length are truncated at their beginning. sharing: of the prompts that
    neighbouring rows begin with.
    """
    room, count = max_positions(base_model(model).config), responses_per_row(model, sharing)
    rows = [row[-room:] for row in rows]
    units = [with_common_prompt(rows[start : start + count]) for start in range(0, len(rows), count)]
    scores = torch.zeros(len(units), count, device=device())
    chunks = batches_of_own([len(unit.ids) for unit in units], rows_of(size, count))
    for chunk in track(title, chunks, len(units) * world_size()):
        padded = pad_shared_rows([units[unit] for unit in chunk], pad_token_id(model))
        input_ids, position_ids, segments = (part.to(device()) for part in padded)  # (b, T) each
        layout = layout_inputs(model, position_ids, segments) if count > 1 else {}
        unit_scores = token_scores(model, input_ids, last_of_segments(segments), **layout)
        scores[torch.tensor(chunk, device=device())] = unit_scores.view(-1, count)
    return scores.flatten()

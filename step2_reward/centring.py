"""Centring: preferences determine scores up to a constant, so demonstrations get mean 0 and deviation 1."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from common.data.batching import micro_batch
from common.data.loading import load_examples
from common.model.engine_protocol import Engine
from common.runtime.distributed import log
from common.text.tokenizer import SegmentEncoder
from step2_reward.data import Preference, Response, tokenize_response
from step2_reward.evaluation.scores import score_statistics
from step2_reward.options import Objective, RewardOptions


def load_centre_rows(
    options: RewardOptions, encoder: SegmentEncoder, train: Sequence[Preference]
) -> list[list[int]]:
    """Load the token ids of the responses whose mean score becomes 0."""
    if options.objective == "cost":
        return []
    if not options.demonstration_data:
        return [train[i].chosen_ids for i in range(min(len(train), options.max_centre_samples))]
    convert = partial(
        tokenize_response, encoder=encoder, max_length=options.max_length, overlong=options.overlong
    )
    unsplit = replace(options, eval_data=[], eval_fraction=0.0, data_split="")
    rows, _ = load_examples(options.demonstration_data, unsplit, Response, convert)
    return [row.ids for row in rows.take(slice(options.max_centre_samples))]


def centre(engine: Engine, rows: list[list[int]], options: RewardOptions) -> bool:
    """Normalise scores so that these rows have mean 0 and standard deviation 1; not those of a cost model.

    Returns False when a stop was requested first.
    """
    if options.objective == "cost":
        return True
    statistics = score_statistics(engine, rows, micro_batch(options), options.output_dir)
    if statistics is None:
        return False
    mean, std = statistics
    set_centre(engine.module, mean, std)
    log(f"raw scores of {len(rows)} responses: mean {mean:.4f}, std {std:.4f}; they become 0 and 1")
    return True


def set_centre(model: nn.Module, mean: float, std: float) -> None:
    model.config.reward_mean, model.config.reward_std = mean, std


def mark_objective(model: nn.Module, objective: Objective) -> None:
    """Mark a cost model in its configuration, for its evaluation and for step 3."""
    if objective == "cost":
        model.config.is_cost_model = True
    elif hasattr(model.config, "is_cost_model"):  # it starts from a cost model
        del model.config.is_cost_model

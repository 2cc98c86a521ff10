"""Every value of every option with choices has a branch, and a value without one never passes for another."""

from collections.abc import Callable
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from common.generation import generate
from common.generation.options import GenerationOptions
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import combine_scores
from common.model.shared_prompt import wants_sharing
from common.text.truncation import Dropped
from common.training import trackers
from common.training.report_to import Trackers
from common.training.train_state import TrainState
from launch.plan.hardware import table_of
from launch.plan.options import PlanOptions
from step1_sft.data import tokenize_demonstration
from step1_sft.loss import training_loss
from step1_sft.options import SFTOptions
from step2_reward.data import converter
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.pair_losses import pair_losses
from step2_reward.direct.rewards import f_rewards
from step2_reward.ilql.options import ILQLOptions
from step2_reward.options import RewardOptions
from step2_reward.process.options import ProcessRewardOptions
from step3_ppo.best_of_n import files as best_of_n_files
from step3_ppo.best_of_n.options import BestOfNOptions
from step3_ppo.best_of_n.select import rejected
from step3_ppo.kl_penalty import KLPenalty
from step3_ppo.losses import kl_loss, token_weights
from step3_ppo.models import Scorer
from step3_ppo.objectives import normalised_scores
from step3_ppo.optimise import surrogate
from step3_ppo.options import PPOOptions
from step3_ppo.returns import estimate_advantages, shape_rewards
from step3_ppo.rewards import RunningScale, aggregate_steps
from step3_ppo.state import PPOState, make_kl_penalty
from tests.step3_ppo.test_returns import PLAIN, SCORER, rollout
from tests.word_encoder import WordEncoder

CLASSES = (
    SFTOptions, RewardOptions, DirectOptions, ProcessRewardOptions, ILQLOptions, PPOOptions, BestOfNOptions,
    PlanOptions,
)  # fmt: skip
TWO = torch.tensor([1.0, 2.0])


def choices() -> dict[str, set[str]]:
    """The values of every option that has choices, in any command."""
    by_option: dict[str, set[str]] = {}
    for options_class in CLASSES:
        hints = get_type_hints(options_class)
        for field in fields(options_class):
            kind = hints[field.name]
            kind = get_args(kind)[0] if get_origin(kind) is list else kind
            if get_origin(kind) is Literal:
                by_option.setdefault(field.name, set()).update(get_args(kind))
    return by_option


def too_long(value: str) -> None:
    record = {"prompt": "a b c d e f", "completion": "g h"}
    try:
        tokenize_demonstration(record, WordEncoder(), 6, value, "response")
    except (Dropped, ValueError):
        assert value in ("drop", "error", "truncate_response")


def engine(value: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generate, "VllmSampler", lambda *_: value)
    assert generate.make_sampler("transformers", "", GenerationOptions(rollout_engine=value)) == value


def tracker(value: str, patch: pytest.MonkeyPatch) -> None:
    for name in ("TensorBoard", "WeightsAndBiases", "MLflow", "Trackio"):
        patch.setattr(trackers, name, lambda run: run)
    names = Trackers(SFTOptions(report_to=[value]), 0).names
    assert [trackers.open_tracker(name, name) for name in names] == [value] * (value != "none")


def estimate(**options: Any) -> None:
    scored = rollout([1.0, 2.0])
    rewards = torch.randn(2, 4) * scored.response_mask
    estimate_advantages(
        scored, rewards, PPOOptions(**options, samples_per_prompt=2), PPOState(KLPenalty(0.1), RunningScale())
    )


def normalise(value: str) -> None:
    scored = replace(rollout([1.0, 2.0]), score_parts=TWO[:, None])
    scorer, options = Scorer([None], [], EnsembleOptions()), PPOOptions(normalise_scores=value)
    normalised_scores(scored, scorer, options, PPOState(KLPenalty(0.1), RunningScale()))


def keep(value: str) -> None:
    scores = np.array([[1.0, 2.0]])
    best_of_n_files._demonstrations(scores, scores > 0, {}, BestOfNOptions(keep=value))


def schedule(value: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(TWO.clone())])
    get_scheduler(value, optimizer, num_warmup_steps=1, num_training_steps=2)


def best_metric(value: str) -> None:
    names = ("eval/loss", "eval/accuracy", "eval/first_error", "eval/score", "eval/score_loss", "eval/gold")
    measured = dict.fromkeys(names, 0.5)
    assert TrainState().is_best(value, measured) == (value != "none")


def direct_loss(value: str) -> None:
    options = DirectOptions(loss=value, beta=0.1)
    if options.is_paired:
        pair_losses(TWO, -TWO, options, torch.zeros(2, 2))


DISPATCH: dict[str, Callable[..., Any]] = {
    "loss_on": lambda v: tokenize_demonstration(
        {"prompt": "a", "completion": "b"}, WordEncoder(), 9, "drop", v
    ),
    "overlong": too_long,
    "lr_scheduler_type": schedule,
    "best_metric": best_metric,
    "share_prompts": lambda v: wants_sharing(v, 2, 1),
    "rollout_engine": engine,
    "report_to": tracker,
    "compile_generation": lambda v: generate.use_compiler(GenerationOptions(compile_generation=v), False),
    "loss": direct_loss,
    "f_divergence": lambda v: f_rewards(TWO, v, 0.5),
    "token_loss": lambda v: training_loss(TWO, 2, v),
    "reward_combine": lambda v: combine_scores(torch.ones(2, 3), v),
    "kl_penalty": lambda v: shape_rewards(
        rollout([1.0, 2.0]), SCORER, PPOOptions(**PLAIN), PPOState(KLPenalty(0.1, v), RunningScale())
    ),
    "normalise_scores": normalise,
    "kl_controller": lambda v: make_kl_penalty(PPOOptions(kl_controller=v), 0.1),
    "advantage_estimator": lambda v: estimate(advantage_estimator=v),
    "reinforce_baseline": lambda v: estimate(advantage_estimator="reinforce", reinforce_baseline=v),
    "policy_loss": lambda v: surrogate(
        TWO, SimpleNamespace(logprobs=TWO, advantages=TWO, lengths=[2]), PPOOptions(policy_loss=v)
    ),
    "loss_aggregation": lambda v: token_weights(TWO.long(), TWO > 1, v, 2),
    "process_aggregation": lambda v: aggregate_steps(-torch.ones(1, 2), TWO[None] > 1, v),
    "keep": keep,
    "objective": lambda v: converter(v, use_margin=False),
    "gpu": lambda v: table_of(v, "hdr200", 8),
    "link": lambda v: table_of("h200", v, 8),
    "pairs": lambda v: rejected(np.array([[1.0, 2.0]]), np.array([[True, True]]), v, [0]),
}
ELSEWHERE = {"device", "attn_implementation"}  # of the plan, whose tests predict for both; of transformers


def test_every_option_with_choices_is_looked_at():
    assert choices().keys() == DISPATCH.keys() | ELSEWHERE


@pytest.mark.parametrize("name", DISPATCH)
def test_a_choice_has_a_branch_and_nothing_else_has(name: str, monkeypatch: pytest.MonkeyPatch):
    more = [monkeypatch] if name in ("rollout_engine", "report_to") else []
    for value in sorted(choices()[name]):
        DISPATCH[name](value, *more)
    with pytest.raises((AssertionError, ValueError, KeyError), match="unheard-of"):
        DISPATCH[name]("unheard-of", *more)


def test_a_term_of_the_loss_and_a_loss_without_pairs_too():
    for estimate_of in ("k2", "k3"):
        kl_loss(TWO, -TWO, estimate_of)
    with pytest.raises(AssertionError, match="reward"):
        kl_loss(TWO, -TWO, "reward")
    with pytest.raises(AssertionError, match="kto"):
        pair_losses(TWO, -TWO, DirectOptions(loss="kto"))

"""The models of PPO, with as few copies of weights as possible."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.model.engine import make_engine, make_frozen
from common.model.engine_protocol import Engine
from common.model.loading import initialise_head, load_causal_lm, load_scalar_model
from common.model.lora import add_adapters
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import RewardModel, load_encoders, load_members, on_device
from common.model.zero import frozen_config, unpartitioned
from common.runtime.distributed import log
from common.text.tokenizer import SegmentEncoder
from step3_ppo.options import PPOOptions
from step3_ppo.reward_functions import RewardFunction


@dataclass
class Scorer:
    """Scores responses: an ensemble of M reward models, and F reward functions."""

    rewards: list[RewardModel]
    functions: list[RewardFunction]
    options: EnsembleOptions


@dataclass
class Models:
    """Actor and critic are trained DeepSpeed engines; reference and reward models are frozen.

    There is a critic only with an estimator that needs one. With adapters, two copies of weights do the work
    of four: the reference is the actor with its adapter off (`reference` is None), and a single reward model
    is the critic with its adapter off.
    """

    actor: Engine
    critic: Engine | None
    reference: nn.Module | None
    scorer: Scorer
    gold: Scorer | None  # scores held-out responses, for evaluation only
    encoder: SegmentEncoder  # of the actor, and of each reward model with the same tokenizer

    @contextlib.contextmanager
    def reference_model(self) -> Iterator[nn.Module]:
        """The reference, for a `with` block."""
        with on_device(self.reference) if self.reference else without_adapter(self.actor) as reference:
            yield reference


@contextlib.contextmanager
def without_adapter(engine: Engine) -> Iterator[nn.Module]:
    """The base model of an engine with adapters, for a `with` block."""
    with engine.module.disable_adapter():
        yield engine


def build_models(
    options: PPOOptions, encoder: SegmentEncoder, reward_encoders: list[SegmentEncoder],
    functions: list[RewardFunction], gold_function: list[RewardFunction], actor_zero: dict[str, Any],
    critic_zero: dict[str, Any], iterations: int,
) -> Models:  # fmt: skip
    """Load all models. iterations: length of the learning-rate schedules; that of the actor starts after the
    critic's warm-up.
    """
    tokenizer = encoder.tokenizer
    has_adapters = options.lora_rank > 0
    shares_reward = has_adapters and options.has_critic and reward_encoders == [encoder]

    reference, rewards = None, []
    if not has_adapters:
        zero = frozen_config(actor_zero, options.offload_frozen)
        base = load_causal_lm(options.actor_model_name_or_path, tokenizer, zero or unpartitioned(actor_zero))
        reference = make_frozen(base, zero, options.offload_frozen)
    if not shares_reward:
        rewards = load_members(options, reward_encoders, critic_zero, options.offload_frozen)

    actor = load_causal_lm(options.actor_model_name_or_path, tokenizer, actor_zero)
    actor = add_adapters(actor, options, options.seed)
    critic = None
    if options.has_critic:
        same_tokenizer = reward_encoders[:1] == [encoder]
        critic = load_critic(options, tokenizer, critic_zero, same_tokenizer)
        critic = add_adapters(critic, options, options.seed)
    actor_iterations = max(iterations - options.critic_warmup_steps, 1)
    actor = make_trained(
        actor, actor_zero, options, options.actor_gradient_checkpointing, options.actor_learning_rate,
        actor_iterations,
    )  # fmt: skip
    if critic:
        critic = make_trained(
            critic, critic_zero, options, options.critic_gradient_checkpointing, options.critic_learning_rate,
            iterations,
        )  # fmt: skip
    if shares_reward:
        rewards = [RewardModel(encoder, partial(without_adapter, critic))]
    gold = None
    if options.gold_reward_model or gold_function:
        single = EnsembleOptions([options.gold_reward_model] if options.gold_reward_model else [])
        encoders = load_encoders(single, encoder, *reward_encoders)
        gold = Scorer(load_members(single, encoders, critic_zero, offload=True), gold_function, single)
    return Models(actor, critic, reference, Scorer(rewards, functions, options), gold, encoder)


def make_trained(
    model: PreTrainedModel, zero: dict[str, Any], options: PPOOptions, checkpointing: bool,
    learning_rate: float, iterations: int,
) -> Engine:  # fmt: skip
    """An engine that trains for `iterations`. checkpointing: gradient checkpointing of this model."""
    own = replace(options, gradient_checkpointing=options.gradient_checkpointing or checkpointing)
    return make_engine(model, zero, own, learning_rate, iterations * options.updates_per_step)


def load_critic(
    options: PPOOptions, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any], same_tokenizer: bool
) -> PreTrainedModel:
    """The initial critic: the first reward model, if it has the actor's tokenizer; else the SFT model with a
    zero head.
    """
    if same_tokenizer:
        log("critic: starts from the reward model")
        return load_scalar_model(options.reward_model_name_or_path[0], tokenizer, zero)
    has_model = bool(options.reward_model_name_or_path)
    reason = "actor and reward model have different tokenizers" if has_model else "there is no reward model"
    log(f"critic: starts from the SFT model with a zero head, because {reason}")
    critic = load_scalar_model(options.actor_model_name_or_path, tokenizer, zero)
    initialise_head(critic, std=0.0)
    return critic

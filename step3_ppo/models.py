"""The models of PPO, in as few copies of weights as possible."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.model.engine import make_engine, make_frozen
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
    """What scores responses: M reward models, whose scores become one as the options say, and F functions."""

    rewards: list[RewardModel]
    functions: list[RewardFunction]
    options: EnsembleOptions


@dataclass
class Models:
    """Actor and critic are DeepSpeed engines that learn; reference and reward models are frozen.

    Without an estimator that needs one there is no critic.

    With adapters, `reference` is None: it is the actor with its adapter off. A single reward model is then
    the critic with its adapter off, as the critic stands on its backbone. Two copies of weights then do the
    work of four.
    """

    actor: Any
    critic: Any | None
    reference: nn.Module | None
    scorer: Scorer
    gold: Scorer | None  # what judges held-out responses, and is never learnt from
    encoder: SegmentEncoder  # the actor's; also of each reward model that reads the same tokens

    @contextlib.contextmanager
    def reference_model(self) -> Iterator[nn.Module]:
        """The reference policy, for the duration of a `with` block."""
        with on_device(self.reference) if self.reference else without_adapter(self.actor) as reference:
            yield reference


@contextlib.contextmanager
def without_adapter(engine: Any) -> Iterator[nn.Module]:
    """A model as it was before it got adapters, for the duration of a `with` block."""
    with engine.module.disable_adapter():
        yield engine


def build_models(
    options: PPOOptions, encoder: SegmentEncoder, reward_encoders: list[SegmentEncoder],
    functions: list[RewardFunction], gold_function: list[RewardFunction], actor_zero: dict[str, Any],
    critic_zero: dict[str, Any], iterations: int,
) -> Models:  # fmt: skip
    """Load everything. iterations: of the whole run, over which the learning rates follow their schedules;
    that of the actor begins after the critic's warm-up.
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
        is_alike = reward_encoders[:1] == [encoder]
        critic = add_adapters(load_critic(options, tokenizer, critic_zero, is_alike), options, options.seed)
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
        alone = EnsembleOptions([options.gold_reward_model] if options.gold_reward_model else [])
        encoders = load_encoders(alone, encoder, *reward_encoders)
        gold = Scorer(load_members(alone, encoders, critic_zero, offload=True), gold_function, alone)
    return Models(actor, critic, reference, Scorer(rewards, functions, options), gold, encoder)


def make_trained(
    model: PreTrainedModel, zero: dict[str, Any], options: PPOOptions, recomputes: bool, learning_rate: float,
    iterations: int,
) -> Any:  # fmt: skip
    """An engine that learns for so many iterations. recomputes: this model alone has checkpointing."""
    own = replace(options, gradient_checkpointing=options.gradient_checkpointing or recomputes)
    return make_engine(model, zero, own, learning_rate, iterations * options.updates_per_step)


def load_critic(
    options: PPOOptions, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any], is_alike: bool
) -> PreTrainedModel:
    """The critic before training: the first reward model, if it reads the actor's tokens, or the SFT model
    with a zero head.
    """
    if is_alike:
        log("critic: starts from the reward model")
        return load_scalar_model(options.reward_model_name_or_path[0], tokenizer, zero)
    has_model = bool(options.reward_model_name_or_path)
    reason = "actor and reward model have unlike tokenizers" if has_model else "there is no reward model"
    log(f"critic: starts from the SFT model with a zero head, because {reason}")
    critic = load_scalar_model(options.actor_model_name_or_path, tokenizer, zero)
    initialise_head(critic, std=0.0)
    return critic

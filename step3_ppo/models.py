"""The four models of PPO, in as few copies of weights as possible."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.distributed import log
from common.engine import make_engine, make_frozen
from common.lora import add_adapters
from common.models import initialise_head, load_causal_lm, load_scalar_model
from common.tokenization import SegmentEncoder
from common.zero import frozen_config, unpartitioned
from step3_ppo.options import PPOOptions


@dataclass
class Models:
    """Actor and critic are DeepSpeed engines that learn; reference and reward model are frozen.

    With adapters, `reference` is None: it is the actor with its adapter off. So is `reward` when the critic
    stands on the reward model's backbone. Two copies of weights then do the work of four.
    """

    actor: Any
    critic: Any
    reference: nn.Module | None
    reward: nn.Module | None
    encoder: SegmentEncoder
    reward_encoder: SegmentEncoder | None  # None when actor and reward model read the same tokens

    @contextlib.contextmanager
    def reference_model(self) -> Iterator[nn.Module]:
        """The reference policy, for the duration of a `with` block."""
        if self.reference is not None:
            yield self.reference
            return
        with self.actor.module.disable_adapter():
            yield self.actor

    @contextlib.contextmanager
    def reward_model(self) -> Iterator[nn.Module]:
        """The reward model, for the duration of a `with` block."""
        if self.reward is not None:
            yield self.reward
            return
        with self.critic.module.disable_adapter():
            yield self.critic


def build_models(
    options: PPOOptions, encoder: SegmentEncoder, reward_encoder: SegmentEncoder | None,
    actor_zero: dict[str, Any], critic_zero: dict[str, Any], updates: int,
) -> Models:  # fmt: skip
    """Load everything. updates: optimiser steps of the whole run, for the learning rate schedules."""
    tokenizer = encoder.tokenizer
    reward_tokenizer = reward_encoder.tokenizer if reward_encoder else tokenizer
    has_adapters = options.lora_rank > 0
    shares_reward = has_adapters and reward_encoder is None

    reference = reward = None
    if not has_adapters:
        zero = frozen_config(actor_zero)
        base = load_causal_lm(options.actor_model_name_or_path, tokenizer, zero or unpartitioned(actor_zero))
        reference = make_frozen(base, zero)
    if not shares_reward:
        zero = frozen_config(critic_zero)
        base = load_scalar_model(
            options.reward_model_name_or_path, reward_tokenizer, zero or unpartitioned(critic_zero)
        )
        reward = make_frozen(base, zero)

    actor = load_causal_lm(options.actor_model_name_or_path, tokenizer, actor_zero)
    actor = add_adapters(actor, options, options.seed)
    critic = add_adapters(
        load_critic(options, tokenizer, critic_zero, reward_encoder is None), options, options.seed
    )
    return Models(
        actor=make_engine(actor, actor_zero, options, options.actor_learning_rate, updates),
        critic=make_engine(critic, critic_zero, options, options.critic_learning_rate, updates),
        reference=reference,
        reward=reward,
        encoder=encoder,
        reward_encoder=reward_encoder,
    )


def load_critic(
    options: PPOOptions, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any], same_tokens: bool
) -> PreTrainedModel:
    """The critic before training: the reward model, or the SFT model with a zero head."""
    if same_tokens:
        log("critic: starts from the reward model")
        return load_scalar_model(options.reward_model_name_or_path, tokenizer, zero)
    log(
        "critic: starts from the SFT model with a zero head,"
        " because actor and reward model have unlike tokenizers"
    )
    critic = load_scalar_model(options.actor_model_name_or_path, tokenizer, zero)
    initialise_head(critic, std=0.0)
    return critic


def same_tokens(a: PreTrainedTokenizerFast, b: PreTrainedTokenizerFast) -> bool:
    """Whether a text, and a conversation, becomes the same ids under both tokenizers."""
    return (
        a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str()
        and a.chat_template == b.chat_template
        and (a.eos_token_id, a.bos_token_id) == (b.eos_token_id, b.bos_token_id)
    )

"""The models of PPO, with as few copies of weights as possible."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.generation.engine_checks import check_rollout_engine
from common.generation.generate import Sampler, fit_prompt_length, make_sampler
from common.model.engine import check_states_away, make_engine, make_frozen
from common.model.engine_protocol import Engine
from common.model.families import check_scalar
from common.model.loading import initialise_head, load_causal_lm, load_scalar_model
from common.model.lora import add_adapters, check_adapters
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import RewardModel, load_encoders, load_members, on_device
from common.model.roles import check_scalar_model, policy_config
from common.model.zero import frozen_config, load_zero_config, unpartitioned
from common.runtime.distributed import log
from common.runtime.options import UserError
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.export import export_model
from common.training.run_folder import check_folder
from step3_ppo.idle_options import warn_of_idle, warn_of_long_warmup
from step3_ppo.options import PPOOptions
from step3_ppo.process_rewards import ProcessModel, check_process, load_process_model
from step3_ppo.reward_functions import RewardFunction, load_functions

TAKEN = ("std", "between", "process")  # by eval/score_std, reward/std_between, reward/mean_process


@dataclass
class Scorer:
    """Scores responses: an ensemble of M reward models, F reward functions, and steps by a process model."""

    rewards: list[RewardModel]
    functions: list[RewardFunction]
    options: EnsembleOptions
    process: ProcessModel | None = None


@dataclass
class Models:
    """Actor and critic are trained DeepSpeed engines; reference and reward models are frozen.

    There is a critic only with an estimator that needs one. With adapters, two copies of weights do the work
    of four: the reference is the actor with its adapter off (`reference` is None), and a single reward model
    is the critic with its adapter off.
    """

    actor: Engine
    sampler: Sampler  # of the actor's responses: the actor, or vLLM with its weights
    critic: Engine | None
    reference: nn.Module | None
    scorer: Scorer
    judges: dict[str, Scorer]  # score held-out responses besides, by name
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


@dataclass(frozen=True)
class ModelSources:
    """What the models are built from, apart from their weights."""

    functions: list[RewardFunction]
    gold_function: list[RewardFunction]
    actor_zero: dict[str, Any]
    critic_zero: dict[str, Any]
    encoder: SegmentEncoder  # of the actor
    reward_encoders: list[SegmentEncoder]  # of each reward model
    scores: Literal["reward", "cost"] = "reward"  # what functions and reward models give

    @property
    def same_tokenizer(self) -> bool:
        """Whether the first reward model has the actor's tokenizer, so that the critic can start from it."""
        return self.reward_encoders[:1] == [self.encoder]

    @property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerFast]:
        """All tokenizers by their names in messages."""
        scorers = {
            f"tokenizer of {self.scores} model {n}": e.tokenizer
            for n, e in enumerate(self.reward_encoders, 1)
        }
        return {"tokenizer": self.encoder.tokenizer, **scorers}


def check_inputs(options: PPOOptions) -> tuple[PPOOptions, ModelSources]:
    """Check functions, ZeRO configurations, models and output directory before any weights are loaded.

    Returns the options with a --max_prompt_length that fits. Raises UserError.
    """
    functions = load_functions(options.reward_function, "reward_function")
    if taken := [function.title for function in functions if function.name in TAKEN]:
        raise UserError(f"{taken[0]}: a metric has this name; rename the function")
    if options.normalise_scores != "off" and not (options.reward_model_name_or_path or functions):
        raise UserError(
            f"--normalise_scores {options.normalise_scores}: scores of steps are not normalised; it needs a"
            " reward model or function"
        )
    gold_function = load_functions(list(filter(None, [options.gold_function])), "gold_function")
    if options.gold_reward_model:
        check_scalar_model(options.gold_reward_model, "gold_reward_model")
    actor_zero = load_zero_config(
        options.actor_zero_config or options.zero_config, options, options.actor_learning_rate
    )
    critic_zero = load_zero_config(
        options.critic_zero_config or options.zero_config, options, options.critic_learning_rate
    )
    if options.offload_states:
        check_states_away(actor_zero, "actor")
        if options.has_critic:
            check_states_away(critic_zero, "critic")
    config = policy_config(options.actor_model_name_or_path, "actor_model_name_or_path")
    options = fit_prompt_length(options, config)
    check_rollout_engine(options, config)
    check_adapters(options.actor_model_name_or_path, options, actor_zero, critic_zero)
    check_folder(options)
    warn_of_idle(options)
    encoder = SegmentEncoder(load_tokenizer(options.actor_model_name_or_path))
    reward_encoders = load_encoders(options, encoder)
    check_process(options, encoder, options.max_prompt_length + options.max_response_length)
    sources = ModelSources(functions, gold_function, actor_zero, critic_zero, encoder, reward_encoders)
    if options.has_critic and not sources.same_tokenizer:
        check_scalar(config)  # the critic starts from the actor's model
    return options, sources


def build_models(options: PPOOptions, sources: ModelSources, iterations: int) -> Models:
    """Load all models. iterations: length of the learning-rate schedules; that of the actor starts after the
    critic's warmup, unless --critic_warmup_until may end it.
    """
    encoder, actor_zero, reference = sources.encoder, sources.actor_zero, None
    if not options.lora_rank:
        zero = frozen_config(actor_zero, options.offload_frozen)
        reference = make_frozen(load_actor(options, sources, zero), zero, options.offload_frozen)
    critic, scorer = build_critic(options, sources, iterations)
    actor = add_adapters(load_actor(options, sources, actor_zero), options, options.seed)
    warmup = 0 if options.critic_warmup_until else options.critic_warmup_steps
    warn_of_long_warmup(options, iterations)
    actor_iterations = max(iterations - warmup, 1)
    actor = make_trained(
        actor, actor_zero, options, options.actor_gradient_checkpointing, options.actor_learning_rate,
        actor_iterations,
    )  # fmt: skip
    judges = {}
    if options.gold_reward_model or sources.gold_function:
        single = EnsembleOptions([options.gold_reward_model] if options.gold_reward_model else [])
        encoders = load_encoders(single, encoder, *sources.reward_encoders)
        members = load_members(single, encoders, sources.critic_zero, offload=True)
        judges["gold"] = Scorer(members, sources.gold_function, single)
    sampler = make_sampler(actor, options.actor_model_name_or_path, options)
    return Models(actor, sampler, critic, reference, scorer, judges, encoder)


def build_critic(options: PPOOptions, sources: ModelSources, iterations: int) -> tuple[Engine | None, Scorer]:
    """The critic, if there is one, and what gives the scores whose returns it learns. With adapters, a single
    reward model is the critic with its adapter off.
    """
    encoder, zero, rewards, critic = sources.encoder, sources.critic_zero, [], None
    is_shared = options.lora_rank > 0 and options.has_critic and sources.reward_encoders == [encoder]
    if not is_shared:
        rewards = load_members(options, sources.reward_encoders, zero, options.offload_frozen)
    if options.has_critic:
        critic = make_trained(
            add_adapters(load_critic(options, sources, zero), options, options.seed), zero, options,
            options.critic_gradient_checkpointing, options.critic_learning_rate, iterations,
        )  # fmt: skip
    if is_shared:
        rewards = [RewardModel(encoder, partial(without_adapter, critic))]
    process = load_process_model(options, encoder, zero, options.offload_frozen)
    return critic, Scorer(rewards, sources.functions, options, process)


def make_trained(
    model: PreTrainedModel, zero: dict[str, Any], options: PPOOptions, checkpointing: bool,
    learning_rate: float, iterations: int,
) -> Engine:  # fmt: skip
    """An engine that trains for `iterations`. checkpointing: gradient checkpointing of this model."""
    own = replace(options, gradient_checkpointing=options.gradient_checkpointing or checkpointing)
    return make_engine(model, zero, own, learning_rate, iterations * options.updates_per_step)


def load_actor(
    options: PPOOptions, sources: ModelSources, zero: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The initial actor, partitioned if the DeepSpeed configuration is at stage 3; None: a full copy."""
    zero = zero or unpartitioned(sources.actor_zero)
    return load_causal_lm(options.actor_model_name_or_path, sources.encoder.tokenizer, zero)


def load_critic(
    options: PPOOptions, sources: ModelSources, zero: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The initial critic: the first reward model, if it has the actor's tokenizer; else the SFT model with a
    zero head.
    """
    zero, tokenizer = zero or unpartitioned(sources.critic_zero), sources.encoder.tokenizer
    kind = sources.scores
    name = "critic" if kind == "reward" else f"{kind} critic"
    if sources.same_tokenizer:
        log(f"{name}: starts from the {kind} model")
        return load_scalar_model(options.reward_model_name_or_path[0], tokenizer, zero)
    has_model = bool(options.reward_model_name_or_path)
    reason = f"actor and {kind} model have different tokenizers" if has_model else f"there is no {kind} model"
    log(f"{name}: starts from the SFT model with a zero head, because {reason}")
    critic = load_scalar_model(options.actor_model_name_or_path, tokenizer, zero)
    initialise_head(critic, std=0.0)
    return critic


def export_models(
    models: Models, options: PPOOptions, sources: ModelSources, folder: Path, average: Mapping[str, Tensor]
) -> None:
    """Write final/, with --ema_decay final_ema/, and with a critic final_critic/. average: EMA weights."""
    tokenizer, load_base = sources.encoder.tokenizer, partial(load_actor, options, sources)
    export_model(models.actor, tokenizer, folder / "final", load_base)
    if options.ema_decay:
        export_model(models.actor, tokenizer, folder / "final_ema", load_base, average)
    if models.critic:
        load_base = partial(load_critic, options, sources)
        export_model(models.critic, tokenizer, folder / "final_critic", load_base)

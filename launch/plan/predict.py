"""From options to the peak memory of each step."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch

from common.generation.generate import fit_prompt_length, use_compiler
from common.generation.vllm_sampler import cache_bytes
from common.model.loading import fit_to_model, load_config
from common.model.lora import check_4bit, check_targets
from common.model.shared_prompt import wants_sharing, work
from common.runtime.option_checks import rows_per_micro_batch
from common.runtime.options import world_size
from launch.plan.memory import FP32, Model, Parts, Shape
from launch.plan.options import PlanOptions
from launch.plan.phases import Phase, Sizes, peak, step1, step2, step3
from launch.plan.shapes import read_shape
from launch.plan.storage import Storage, storage
from launch.plan.zero import frozen, read_zero
from step3_ppo.options import PPOOptions

GIB = 2**30

# Assumptions: predictions for GPUs have not been compared with measurements. CUDA context, kernels of the
# libraries, workspaces of cuBLAS; buffers of NCCL within a machine, and those between machines.
CUDA, NCCL, NETWORK = 1.0 * GIB, 0.5 * GIB, 0.5 * GIB
# Python with all libraries: resident memory of step 2 on a model of 0.6 million parameters, minus the
# predicted 0.01 GiB (torch 2.13, one rank).
CPU_FIXED = 0.40 * GIB


read_config = cache(load_config)  # remedies predict hundreds of times


class Models(NamedTuple):
    """The models of the three steps. critic, reference: None where step 3 has none of its own."""

    policy: Model
    reward: Model
    actor: Model
    critic: Model | None
    reference: Model | None
    scorers: list[Model]
    cost_critic: Model | None


def predict(options: PlanOptions) -> dict[str, Phase]:
    """The peak of each step on one rank, by part. The number of ranks is `world_size()`.

    Raises UserError for options that a stage refuses, and for models with unknown layers.
    """
    return {step: peak(phases) for step, phases in predict_phases(options).items()}


def predict_phases(options: PlanOptions) -> dict[str, list[Phase]]:
    """All phases of each step in which memory may peak."""
    options = fitted(options)
    policy, reward, *of_step3, cost_critic = read_models(options)
    sizes, fixed = batch_sizes(options, of_step3[0]), Parts(fixed=_fixed(options))
    return {
        "step 1": [*step1(policy, sizes, fixed)],
        "step 2": [*step2(reward, sizes, fixed)],
        "step 3": [*step3(*of_step3, sizes, fixed, cost_critic)],
    }


def fitted(options: PlanOptions) -> PlanOptions:
    """Options with lengths within the model's context, as the stages use them."""
    config = read_config(options.model_name_or_path)
    return fit_prompt_length(fit_to_model(options, config), config)


def predict_storage(options: PlanOptions) -> dict[str, Storage]:
    """Host memory for exports, and disk space, of each step."""
    models = read_models(options)
    trained = [*filter(None, (models.actor, models.critic, models.cost_critic))]
    return {
        "step 1": storage([models.policy]),
        "step 2": storage([models.reward]),
        "step 3": storage(trained, options.ema_decay > 0),
    }


def read_models(options: PlanOptions) -> Models:
    """Shapes and ZeRO settings of all models."""
    path, rewards = options.model_name_or_path, options.reward_model_name_or_path
    check_targets(path, options)
    hidden = read_config(path).get_text_config().hidden_size
    zero = read_zero(options.zero_config, options, options.learning_rate, hidden)
    actor_zero, critic_zero = (
        read_zero(own or options.zero_config, options, rate, hidden)
        for own, rate in (
            (options.actor_zero_config, options.actor_learning_rate),
            (options.critic_zero_config, options.critic_learning_rate),
        )
    )

    check_4bit(options, zero.stage, actor_zero.stage, critic_zero.stage)

    def shape(path: str, is_scalar: bool, rank: int = options.lora_rank) -> Shape:
        targets = tuple(options.lora_target_modules) if rank else ()
        quantisation = "double" if options.double_quantisation else "single"
        bits = quantisation if rank and options.load_in_4bit else "none"
        return read_shape(path, is_scalar, rank, targets, options.attn_implementation, bits)

    policy, critic, reference = shape(path, False), None, None
    if options.advantage_estimator == "gae":
        critic = Model(shape(rewards[0] if rewards else path, True), critic_zero)
    if not options.lora_rank:
        reference = Model(replace(policy, trained=0), frozen(actor_zero, options.offload_frozen))
    offload = options.offload_frozen or (len(rewards) > 1 and critic_zero.stage < 3)
    zero_of_scorers = frozen(critic_zero, offload)
    outcome, process = paths_of_scorers(options)
    if options.lora_rank and critic and len(outcome) == 1:
        outcome = []  # the reward model is the critic without its adapter
    scorers = [Model(replace(shape(one, True, 0), trained=0), zero_of_scorers) for one in outcome + process]
    if options.gold_reward_model:
        gold = replace(shape(options.gold_reward_model, True, 0), trained=0)
        scorers.append(Model(gold, frozen(critic_zero, True)))
    cost_critic, of_costs = None, options.cost_model_name_or_path
    if options.has_costs:
        cost_critic = Model(shape(of_costs or path, True), critic_zero)
    if of_costs and not options.lora_rank:
        cost_model = replace(shape(of_costs, True, 0), trained=0)
        scorers.insert(0, Model(cost_model, frozen(critic_zero, options.offload_frozen)))
    reward = Model(shape(path, True), zero)
    return Models(
        Model(policy, zero), reward, Model(policy, actor_zero), critic, reference, scorers, cost_critic
    )


def paths_of_scorers(options: PlanOptions) -> tuple[list[str], list[str]]:
    """Reward models of whole responses, by default one with the policy's shape, and the process model."""
    process = [options.process_model_name_or_path] * bool(options.process_model_name_or_path)
    return options.reward_model_name_or_path or [options.model_name_or_path] * (not process), process


def setting(options: PlanOptions) -> str:
    """Head line of the table: parameters, precision, ZeRO stage, batch sizes and lengths."""
    config = read_config(options.model_name_or_path)
    hidden, targets = config.get_text_config().hidden_size, tuple(options.lora_target_modules)
    zero = read_zero(options.zero_config, options, options.learning_rate, hidden)
    policy = read_shape(options.model_name_or_path, False, options.lora_rank, targets)
    rewards = [
        f"{read_shape(path, True, 0, ()).parameters / 1e9:.2f} B"
        for path in options.reward_model_name_or_path or [options.model_name_or_path]
    ]
    trained = f" ({policy.trained / 1e6:.1f} M trained)" if options.lora_rank else ""
    bits = ("4- and " if options.load_in_4bit else "") + str(8 * zero.size)
    tokens = options.micro_batch_tokens
    size = f"of {tokens} tokens" if tokens else rows_per_micro_batch(options)
    device = "GPU" if options.device == "gpu" else "CPU rank"
    estimator = options.advantage_estimator
    generated = min(options.generation_batch_size, -(-options.rollout_batch_size // world_size()))
    return "\n".join(
        [
            f"policy {policy.parameters / 1e9:.2f} B parameters{trained}, reward model {', '.join(rewards)};"
            f" ZeRO-{zero.stage}, {bits}-bit weights, {options.num_gpus}"
            f" {device}{'s' * (options.num_gpus > 1)}; micro-batch {size}",
            f"steps 1 and 2: rows of {options.max_length} tokens; step 3: prompts of"
            f" {options.max_prompt_length} and responses of {options.max_response_length} tokens,"
            f" {generated} per rank generated at once, --advantage_estimator {estimator}",
        ]
    )


def _fixed(options: PlanOptions) -> float:
    """Memory of the libraries."""
    if options.device == "cpu":
        return CPU_FIXED
    ranks = world_size()
    return CUDA + NCCL * (ranks > 1) + NETWORK * (ranks > options.gpus_per_node)


def batch_sizes(options: PlanOptions, actor: Model) -> Sizes:
    """Batch sizes and lengths on one rank."""
    share = -(-options.rollout_batch_size // world_size())
    is_vllm = options.rollout_engine == "vllm"
    return Sizes(
        micro_batch=rows_per_micro_batch(options),
        tokens=options.micro_batch_tokens,
        accumulates=bool(options.micro_batch_tokens or options.ptx_data)
        or options.global_batch_size > rows_per_micro_batch(options) * world_size(),
        checkpointing=options.gradient_checkpointing,
        actor_checkpointing=options.gradient_checkpointing or options.actor_gradient_checkpointing,
        critic_checkpointing=options.gradient_checkpointing or options.critic_gradient_checkpointing,
        length=options.max_length,
        packs=options.packing and options.attn_implementation in ("auto", "sdpa", "eager"),
        samples=-(-options.num_samples // world_size()),
        sample_length=options.sample_length,
        prompt=options.max_prompt_length,
        response=options.max_response_length,
        generated=min(options.generation_batch_size, share),
        group=options.samples_per_prompt,
        sharing=_sharing(options, actor.shape.hidden),
        compiles=use_compiler(options, options.device == "gpu"),
        rollout=options.rollout_batch_size,
        top_k=options.top_k,
        top_p=options.top_p,
        gathers=options.gather_for_generation,
        engine_ranks=options.rollout_tensor_parallel if is_vllm else 0,
        engine_cache=_engine_cache(options, actor.zero.size) if is_vllm else 0.0,
        offloads_states=options.offload_states,
    )


def _sharing(options: PlanOptions, hidden: int) -> int:
    """Responses that share a row with their prompt in step 3."""
    count = PPOOptions.responses_per_row.fget(options)
    prompt, response = options.max_prompt_length, options.max_response_length
    separate = work([(1, prompt + response)] * count, hidden, False)
    shared = work([(1, prompt + count * response)], hidden, True)
    return count if count > 1 and wants_sharing(options.share_prompts, separate, shared) else 1


def _engine_cache(options: PlanOptions, size: int) -> int:
    """Bytes of vLLM's keys and values."""
    longest = options.max_prompt_length + options.max_response_length
    dtype = torch.bfloat16 if size == FP32 // 2 else torch.float32
    return cache_bytes(read_config(options.model_name_or_path), dtype, options, longest)

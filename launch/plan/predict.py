"""From options to the peak memory of each step."""

import json
from dataclasses import replace
from pathlib import Path

from common.generation.generate import fit_prompt_length
from common.model.loading import fit_to_model, load_config
from common.model.lora import check_targets
from common.model.zero import CONFIG_FOLDER, fill_bucket_sizes, load_zero_config, offloads
from common.runtime.option_checks import rows_per_micro_batch
from common.runtime.options import world_size
from launch.plan.memory import ALLREDUCE_BUCKET, FP32, Model, Parts, Zero
from launch.plan.options import PlanOptions
from launch.plan.phases import Phase, Sizes, peak, step1, step2, step3
from launch.plan.shapes import read_shape

GIB = 2**30

# CUDA context, kernels of the libraries, workspaces of cuBLAS and NCCL. An assumption: predictions for GPUs
# have not been compared with measurements.
GPU_FIXED = 1.0 * GIB
# Python with all libraries: resident memory of step 2 on a model of 0.6 million parameters, minus the
# predicted 0.01 GiB (torch 2.13, one rank).
CPU_FIXED = 0.40 * GIB


def predict(options: PlanOptions) -> dict[str, Phase]:
    """The peak of each step on one rank, by part. The number of ranks is `world_size()`.

    Raises UserError for options that a stage refuses, and for models with unknown layers.
    """
    path, rewards = options.model_name_or_path, options.reward_model_name_or_path
    config = load_config(path)
    options = fit_to_model(options, config)
    options = fit_prompt_length(options, config)
    check_targets(path, options)
    hidden, targets = config.get_text_config().hidden_size, tuple(options.lora_target_modules)
    zero = _zero(options.zero_config, options, options.learning_rate, hidden)
    actor_zero, critic_zero = (
        _zero(own or options.zero_config, options, rate, hidden)
        for own, rate in (
            (options.actor_zero_config, options.actor_learning_rate),
            (options.critic_zero_config, options.critic_learning_rate),
        )
    )
    policy = read_shape(path, False, options.lora_rank, targets)
    scalar = read_shape(path, True, options.lora_rank, targets)
    critic = reference = None
    if options.advantage_estimator == "gae":
        first = rewards[0] if rewards else path
        critic = Model(read_shape(first, True, options.lora_rank, targets), critic_zero)
    if not options.lora_rank:
        reference = Model(replace(policy, trained=0), _frozen(actor_zero, options.offload_frozen))
    offload = options.offload_frozen or (len(rewards) > 1 and critic_zero.stage < 3)
    frozen = _frozen(critic_zero, offload)
    scorers = [Model(read_shape(one, True, 0, ()), frozen) for one in rewards or [path]]
    if options.lora_rank and critic and len(scorers) == 1:
        scorers = []  # the reward model is the critic without its adapter
    sizes, fixed = _sizes(options), Parts(fixed=CPU_FIXED if options.device == "cpu" else GPU_FIXED)
    return {
        "step 1": peak(step1(Model(policy, zero), sizes, fixed)),
        "step 2": peak(step2(Model(scalar, zero), sizes, fixed)),
        "step 3": peak(step3(Model(policy, actor_zero), critic, reference, scorers, sizes, fixed)),
    }


def setting(options: PlanOptions) -> str:
    """Head line of the table: parameters, precision, ZeRO stage, batch sizes and lengths."""
    config = load_config(options.model_name_or_path)
    hidden, targets = config.get_text_config().hidden_size, tuple(options.lora_target_modules)
    zero = _zero(options.zero_config, options, options.learning_rate, hidden)
    policy = read_shape(options.model_name_or_path, False, options.lora_rank, targets)
    rewards = [
        f"{read_shape(path, True, 0, ()).parameters / 1e9:.2f} B"
        for path in options.reward_model_name_or_path or [options.model_name_or_path]
    ]
    trained = f" ({policy.trained / 1e6:.1f} M trained)" if options.lora_rank else ""
    tokens = options.micro_batch_tokens
    size = f"of {tokens} tokens" if tokens else rows_per_micro_batch(options)
    device = "GPU" if options.device == "gpu" else "CPU rank"
    estimator = options.advantage_estimator
    return "\n".join(
        [
            f"policy {policy.parameters / 1e9:.2f} B parameters{trained}, reward model {', '.join(rewards)};"
            f" ZeRO-{zero.stage}, {'16' if zero.size == 2 else '32'}-bit weights, {options.num_gpus}"
            f" {device}{'s' * (options.num_gpus > 1)}; micro-batch {size}",
            f"steps 1 and 2: rows of {options.max_length} tokens; step 3: prompts of"
            f" {options.max_prompt_length} and responses of {options.max_response_length} tokens,"
            f" {_sizes(options).generated} per rank generated at once, --advantage_estimator {estimator}",
        ]
    )


def _sizes(options: PlanOptions) -> Sizes:
    share = -(-options.rollout_batch_size // world_size())
    return Sizes(
        micro_batch=rows_per_micro_batch(options),
        tokens=options.micro_batch_tokens,
        accumulates=bool(options.micro_batch_tokens)
        or options.global_batch_size > rows_per_micro_batch(options) * world_size(),
        checkpointing=options.gradient_checkpointing,
        actor_checkpointing=options.gradient_checkpointing or options.actor_gradient_checkpointing,
        critic_checkpointing=options.gradient_checkpointing or options.critic_gradient_checkpointing,
        length=options.max_length,
        prompt=options.max_prompt_length,
        response=options.max_response_length,
        generated=min(options.generation_batch_size, share),
        rollout=options.rollout_batch_size,
        top_k=options.top_k,
        top_p=options.top_p,
        gathers=options.gather_for_generation,
        engine_ranks=options.rollout_tensor_parallel if options.rollout_engine == "vllm" else 0,
        offloads_states=options.offload_states,
    )


def _frozen(trained: Zero, offload: bool) -> Zero:
    """ZeRO settings of a frozen model, derived from those of a trained one."""
    return replace(trained, offloads_weights=trained.offloads_weights or offload)


def _zero(path: str, options: PlanOptions, learning_rate: float, hidden: int) -> Zero:
    """ZeRO settings from a DeepSpeed JSON, or from the default one of the planned device."""
    on_cpu = options.device == "cpu"
    path = path or str(CONFIG_FOLDER / ("zero0.json" if on_cpu else "zero2.json"))
    config = load_zero_config(path, replace(options, attn_implementation="auto"), learning_rate)
    fill_bucket_sizes(config, hidden)
    zero = config["zero_optimization"]
    is_16_bit = any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    if json.loads(Path(path).read_text()).get("bf16", {}).get("enabled") == "auto":
        is_16_bit = zero["stage"] > 0 and not on_cpu  # "auto" was resolved for this machine's device
    return Zero(
        stage=zero["stage"],
        ranks=world_size(),
        size=FP32 // 2 if is_16_bit else FP32,
        offloads_optimiser=offloads(config, "offload_optimizer"),
        offloads_weights=zero["stage"] == 3 and offloads(config, "offload_param"),
        bucket=int(zero.get("reduce_bucket_size", ALLREDUCE_BUCKET)),
        buffers=2 if zero.get("overlap_comm", zero["stage"] == 3) else 1,
        live=int(zero.get("stage3_max_live_parameters", Zero.live)),
        on_cpu=on_cpu,
    )

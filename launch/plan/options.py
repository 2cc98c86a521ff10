"""Options of the plan: the options of the stages that affect memory or time, as declared there; hardware."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from common.generation.options import GenerationOptions
from common.model.options import EnsembleOptions
from common.runtime.options import LoraOptions, OptimiserOptions, TrainOptions, option
from launch.plan.hardware import GpuName, LinkName
from step1_sft.options import SFTOptions
from step3_ppo.option_groups import AlgorithmOptions, SamplingOptions
from step3_ppo.options import PPOOptions
from step3_ppo.safe.options import SafeOptions

ESTIMATOR = AlgorithmOptions.__annotations__["advantage_estimator"]
ENGINE = GenerationOptions.__annotations__["rollout_engine"]
COMPILE = GenerationOptions.__annotations__["compile_generation"]
SHARE = SamplingOptions.__annotations__["share_prompts"]


def same_as(stage: type, name: str) -> Any:
    """An option of a stage, with its default, help and limits."""
    field = stage.__dataclass_fields__[name]
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    return option(default, field.metadata["help"], field.metadata["required"], **field.metadata["limits"])


@dataclass
class PlanOptions(OptimiserOptions, LoraOptions):
    """Predict memory and time of the three steps per GPU. The options are those of the steps."""

    num_gpus: int = option(1, "Ranks, over all machines.", at_least=1)
    gpus_per_node: int = option(8, "Ranks on one machine, which share its host memory.", at_least=1)
    device: Literal["gpu", "cpu"] = option("gpu", "Device of the ranks; independent of this machine.")
    gpu: GpuName = option("a100_80gb", "GPU whose time is estimated.")
    link: LinkName = option(
        "hdr200",
        "Network between machines.\nhdr200: 200 Gb/s InfiniBand per GPU\nndr400: 400 Gb/s InfiniBand per GPU"
        "\nefa400: 400 Gb/s per machine\nethernet100: 100 Gb/s per machine\n",
    )
    measured_speeds: str = option("", "JSON of measured speeds, which replace those of the data sheets.")
    price_per_gpu_hour: float = option(0.0, "Dollars per GPU and hour; 0: no dollars.", at_least=0)
    num_demonstrations: int = option(0, "Records of step 1, for its hours; 0: unknown.", at_least=0)
    num_preferences: int = option(0, "Records of step 2, for its hours; 0: unknown.", at_least=0)
    num_prompts: int = option(0, "Prompts of step 3, for its hours; 0: unknown.", at_least=0)
    num_train_epochs: float = same_as(TrainOptions, "num_train_epochs")
    model_name_or_path: str = same_as(TrainOptions, "model_name_or_path")
    reward_model_name_or_path: list[str] = same_as(EnsembleOptions, "reward_model_name_or_path")
    process_model_name_or_path: str = same_as(PPOOptions, "process_model_name_or_path")
    cost_model_name_or_path: str = same_as(SafeOptions, "cost_model_name_or_path")
    cost_function: list[str] = same_as(SafeOptions, "cost_function")
    gold_reward_model: str = same_as(PPOOptions, "gold_reward_model")
    ptx_data: list[str] = same_as(PPOOptions, "ptx_data")
    learning_rate: float = same_as(TrainOptions, "learning_rate")
    max_length: int = same_as(TrainOptions, "max_length")
    packing: bool = same_as(SFTOptions, "packing")
    num_samples: int = same_as(SFTOptions, "num_samples")
    sample_length: int = same_as(SFTOptions, "sample_length")
    save_total_limit: int = same_as(TrainOptions, "save_total_limit")
    actor_zero_config: str = same_as(PPOOptions, "actor_zero_config")
    critic_zero_config: str = same_as(PPOOptions, "critic_zero_config")
    actor_gradient_checkpointing: bool = same_as(PPOOptions, "actor_gradient_checkpointing")
    critic_gradient_checkpointing: bool = same_as(PPOOptions, "critic_gradient_checkpointing")
    offload_frozen: bool = same_as(PPOOptions, "offload_frozen")
    offload_states: bool = same_as(PPOOptions, "offload_states")
    actor_learning_rate: float = same_as(PPOOptions, "actor_learning_rate")
    critic_learning_rate: float = same_as(PPOOptions, "critic_learning_rate")
    advantage_estimator: ESTIMATOR = same_as(PPOOptions, "advantage_estimator")
    ppo_epochs: int = same_as(PPOOptions, "ppo_epochs")
    ema_decay: float = same_as(PPOOptions, "ema_decay")
    samples_per_prompt: int = same_as(PPOOptions, "samples_per_prompt")
    share_prompts: SHARE = same_as(PPOOptions, "share_prompts")
    rollout_batch_size: int = same_as(PPOOptions, "rollout_batch_size")
    generation_batch_size: int = same_as(PPOOptions, "generation_batch_size")
    max_prompt_length: int = same_as(PPOOptions, "max_prompt_length")
    max_response_length: int = same_as(PPOOptions, "max_response_length")
    top_k: int = same_as(PPOOptions, "top_k")
    top_p: float = same_as(PPOOptions, "top_p")
    gather_for_generation: bool = same_as(PPOOptions, "gather_for_generation")
    compile_generation: COMPILE = same_as(PPOOptions, "compile_generation")
    rollout_engine: ENGINE = same_as(PPOOptions, "rollout_engine")
    rollout_tensor_parallel: int = same_as(PPOOptions, "rollout_tensor_parallel")

    @property
    def has_costs(self) -> bool:
        """Whether step 3 has a limit on costs, and a critic of them."""
        return bool(self.cost_model_name_or_path or self.cost_function)

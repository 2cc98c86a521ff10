"""Estimates of `launch/plan.sh` beside published seconds of other systems, for the same shapes. Needs no GPU.

python tests/bench/plan_time.py    # prints the table of launch/plan/README.md
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig, OPTConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from launch.plan.hardware import GPUS
from launch.plan.memory import total
from launch.plan.options import PlanOptions
from launch.plan.predict import GIB, predict
from launch.plan.step_seconds import step_seconds

ZERO = Path(__file__).resolve().parents[2] / "common/zero_configs"


def llama(hidden: int, layers: int, heads: int, keys: int, mlp: int, vocabulary: int = 32000) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
        intermediate_size=mlp, vocab_size=vocabulary, max_position_embeddings=4096,
    )  # fmt: skip


def opt(hidden: int, layers: int, heads: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden,
    )  # fmt: skip


MODELS: dict[str, PretrainedConfig] = {
    "OPT-350M": opt(1024, 24, 16),
    "OPT-6.7B": opt(4096, 32, 32),
    "OPT-13B": opt(5120, 40, 40),
    "OPT-30B": opt(7168, 48, 56),
    "OPT-66B": opt(9216, 64, 72),
    "Llama-2-7B": llama(4096, 32, 32, 32, 11008),
    "Llama-2-13B": llama(5120, 40, 40, 40, 13824),
    "Llama-2-70B": llama(8192, 80, 64, 8, 28672),
    "Llama-3.1-8B": llama(4096, 32, 32, 8, 14336, 128256),
}


class Case(NamedTuple):
    """A published run: its seconds per iteration, and the same settings here."""

    system: str
    model: str
    gpus: int
    gpu: str
    seconds: float
    options: dict[str, Any]
    reward_model: str = ""  # empty: as large as the policy


def zero(name: str) -> dict[str, str]:
    return {"zero_config": str(ZERO / f"{name}.json")}


def vllm(ranks: int, rows: int) -> dict[str, Any]:
    return {"rollout_engine": "vllm", "rollout_tensor_parallel": ranks, "generation_batch_size": rows}


# 264,292 prompts of 256 tokens and responses of 256, in iterations of 1,024 with one update; seconds from the
# hours of tables 1 and 2 (DeepSpeed-Chat, README.md and BenckmarkSetting.md).
CHAT = {
    "rollout_batch_size": 1024, "global_batch_size": 1024, "ppo_epochs": 1, "max_prompt_length": 256,
    "max_response_length": 256, "offload_frozen": True, "gradient_checkpointing": True,
}  # fmt: skip
HOUR = 3600 * 1024 / 264_292
# 1,024 prompts and responses of 1,024 tokens each, updates of 128 (OpenRLHF, benchmark with vLLM 0.3.1).
RLHF = CHAT | {"global_batch_size": 128, "max_prompt_length": 1024, "max_response_length": 1024}
# 64 prompts with 32 responses each, of 1,019 tokens on average (NeMo-RL v0.5, performance summary).
NEMO = CHAT | {
    "rollout_batch_size": 2048, "global_batch_size": 2048, "samples_per_prompt": 32, "max_prompt_length": 128,
    "max_response_length": 891, "advantage_estimator": "group",
}  # fmt: skip
CASES = [
    Case("DeepSpeed-Chat", "OPT-6.7B", 8, "a100_80gb", 4.1 * HOUR, CHAT, "OPT-350M"),
    Case("DeepSpeed-Chat", "OPT-6.7B", 64, "a100_80gb", 0.85 * HOUR, CHAT, "OPT-350M"),
    Case("DeepSpeed-Chat", "OPT-13B", 8, "a100_80gb", 9 * HOUR, CHAT, "OPT-350M"),
    Case("DeepSpeed-Chat", "OPT-13B", 64, "a100_80gb", 1.25 * HOUR, CHAT, "OPT-350M"),
    Case(
        "DeepSpeed-Chat", "OPT-30B", 8, "a100_80gb", 18 * HOUR, CHAT | zero("zero3_offload") | vllm(8, 128),
        "OPT-350M",
    ),
    Case(
        "DeepSpeed-Chat", "OPT-66B", 64, "a100_80gb", 7.5 * HOUR, CHAT | zero("zero3") | vllm(8, 128),
        "OPT-350M",
    ),
    Case("OpenRLHF", "Llama-2-7B", 8, "a100_80gb", 885, RLHF | zero("zero3") | vllm(2, 64)),
    Case("OpenRLHF", "Llama-2-13B", 8, "a100_80gb", 2393, RLHF | zero("zero3_offload") | vllm(4, 128)),
    Case("OpenRLHF", "Llama-2-70B", 16, "a100_80gb", 9823, RLHF | zero("zero3_offload") | vllm(8, 128)),
    Case("NeMo-RL", "Llama-3.1-8B", 16, "h100_80gb", 92.8, NEMO | vllm(1, 128)),
]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            config.save_pretrained(Path(folder) / name)
        for case in CASES:
            print(row(case, Path(folder)))


def row(case: Case, folder: Path) -> str:
    """A line of the table: system, model, GPUs, both seconds, and the largest phases here."""
    os.environ["WORLD_SIZE"] = str(case.gpus)
    rewards = [str(folder / case.reward_model)] if case.reward_model else []
    options = PlanOptions(
        num_gpus=case.gpus, gpu=case.gpu, model_name_or_path=str(folder / case.model),
        reward_model_name_or_path=rewards, **case.options,
    )  # fmt: skip
    seconds, peak = step_seconds(options)["step 3"].seconds, total(predict(options)["step 3"].parts) / GIB
    room = "" if peak <= 0.95 * GPUS[case.gpu].gib else " does not fit!"
    shares = ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.most_common(3))
    published = f"| {case.system} | {case.model} | {case.gpus} x {case.gpu} | {case.seconds:.0f} |"
    return f"{published} {seconds.total():.0f} | {shares} | {peak:.0f}{room} |"


if __name__ == "__main__":
    main()

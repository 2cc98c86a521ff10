"""A tiny model, its data, and the options of the three stages on them; what a run has measured."""

import json
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from launch.quickstart.build import build_tokenizer, write_data

ZERO = Path(__file__).resolve().parents[1] / "common/zero_configs"
LORA = ["--lora_rank", "4", "--lora_alpha", "8"]
QLORA = [*LORA, "--load_in_4bit"]
CLOSE = {"rel": 1e-4, "abs": 2e-6}


def make_world(folder: Path, hidden_size: int = 32, tied: bool = True) -> Path:
    """Write them to a folder. tied: the output head has the weights of the embedding."""
    (folder / "model").mkdir(parents=True)
    tokenizer = build_tokenizer(folder / "model", write_data(folder, seed=0))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def common(output: Path, steps: int) -> list[str]:
    return [
        "--output_dir", str(output), "--max_steps", str(steps), "--logging_steps", "1",
        "--global_batch_size", "8", "--micro_batch_size", "2", "--max_eval_samples", "12",
        "--eval_steps", "0", "--save_steps", "0",
    ]  # fmt: skip


def sft(world: Path, output: Path, steps: int = 5) -> list[str]:
    return [
        *common(output, steps), "--model_name_or_path", str(world / "model"), "--learning_rate", "1e-3",
        "--train_data", str(world / "demonstrations.jsonl"), "--num_samples", "1", "--sample_length", "4",
    ]  # fmt: skip


def reward(world: Path, start: Path, output: Path, steps: int = 5) -> list[str]:
    return [
        *common(output, steps), "--model_name_or_path", str(start), "--learning_rate", "1e-3",
        "--train_data", str(world / "preferences.jsonl"),
        "--eval_data", str(world / "preferences_heldout.jsonl"),
    ]  # fmt: skip


def ppo(world: Path, actor: Path, reward_model: Path, output: Path, steps: int = 5) -> list[str]:
    return [
        *common(output, steps), "--actor_model_name_or_path", str(actor),
        "--reward_model_name_or_path", str(reward_model), "--prompt_data", str(world / "prompts.jsonl"),
        "--rollout_batch_size", "16", "--ppo_epochs", "2", "--max_response_length", "8",
        "--actor_learning_rate", "1e-3", "--critic_learning_rate", "1e-3",
    ]  # fmt: skip


def metrics(output: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def timeless(output: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what the clock and the machine decide."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("time/", "memory/")) and "per_second" not in k and k != "train/mfu"
        }
        for line in lines
    ]

"""Train one stage with TRL and print one JSON line: seconds of each measured step and the peak memory.

Usage: ``run_trl.py STAGE --config JSON``, in the environment that ``compare.py`` makes: TRL 1.16; 1.12 for
PPO on ``PYTHONPATH``. A step lasts from the end of the step before to its own end, so that fetching the batch
and logging count. Gradient checkpointing, evaluation, saving and reporting are off.
"""

import argparse
import json
import os
import resource
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

Config = dict[str, Any]


class StepClock(TrainerCallback):
    """Remember when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called after each optimiser step; by PPO after each rollout and the epochs over it."""
        self.ends.append(time.perf_counter())

    def seconds(self, warmup: int) -> list[float]:
        """Durations of the steps after the warmup."""
        return [end - start for start, end in pairwise(self.ends[warmup - 1 :])]


def common_arguments(config: Config) -> Config:
    """The training arguments that all three trainers share."""
    return {
        "output_dir": config["output_dir"],
        "per_device_train_batch_size": config["batch_size"],
        "gradient_accumulation_steps": 1,
        "learning_rate": config["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "bf16": config["precision"] == "bf16",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "seed": config["seed"],
    }


def load_policy(config: Config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The language model; fp32 weights for training, which TRL's bf16 mode runs under autocast."""
    return AutoModelForCausalLM.from_pretrained(config["policy"], dtype=dtype)


def load_scorer(config: Config, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The scalar-head model."""
    return AutoModelForSequenceClassification.from_pretrained(
        config["reward_model"], num_labels=1, dtype=dtype
    )


def make_sft(config: Config, data: Dataset, tokenizer: PreTrainedTokenizerBase, clock: StepClock) -> Trainer:
    """SFT on prompt-completion pairs, loss on the completion."""
    arguments = trl.SFTConfig(
        **common_arguments(config),
        max_steps=config["total_steps"],
        max_length=config["max_length"],
        completion_only_loss=True,
    )
    return trl.SFTTrainer(
        load_policy(config), arguments, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    )


def make_reward(
    config: Config, data: Dataset, tokenizer: PreTrainedTokenizerBase, clock: StepClock
) -> Trainer:
    """Pairwise reward model."""
    arguments = trl.RewardConfig(
        **common_arguments(config), max_steps=config["total_steps"], max_length=config["max_length"]
    )
    return trl.RewardTrainer(
        load_scorer(config), arguments, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    )


def make_direct(
    config: Config, data: Dataset, tokenizer: PreTrainedTokenizerBase, clock: StepClock
) -> Trainer:
    """DPO. The reference is read before training, as Triptych does."""
    arguments = trl.DPOConfig(
        **common_arguments(config),
        max_steps=config["total_steps"],
        max_length=config["max_length"],
        beta=0.1,
        precompute_ref_log_probs=True,
    )
    return trl.DPOTrainer(
        load_policy(config), args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    )


def make_ppo(config: Config, data: Dataset, tokenizer: PreTrainedTokenizerBase, clock: StepClock) -> Trainer:
    """PPO with four models, one minibatch per epoch."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    ppo_trainer.gc = SimpleNamespace(collect=lambda: 0)  # two full collections a step would count against TRL
    if config["precision"] == "bf16":  # its Accelerator reads this and not `bf16=True`
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    frozen = torch.bfloat16 if config["precision"] == "bf16" else torch.float32
    arguments = PPOConfig(
        **common_arguments(config),
        total_episodes=config["total_steps"] * config["batch_size"],
        num_ppo_epochs=config["ppo_epochs"],
        num_mini_batches=1,
        response_length=config["response_length"],
        temperature=1.0,
        stop_token="eos",
        num_sample_generations=0,
    )
    tokenizer.padding_side = "left"
    data = Dataset.from_dict({"input_ids": tokenizer(data["prompt"][:])["input_ids"]})
    return PPOTrainer(
        arguments,
        tokenizer,
        model=load_policy(config),
        ref_model=load_policy(config, frozen),
        reward_model=load_scorer(config, frozen),
        value_model=load_scorer(config),
        train_dataset=data,
        callbacks=[clock],
    )


def main() -> None:
    """Train, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["sft", "reward", "direct", "ppo"])
    parser.add_argument("--config", type=json.loads, required=True)
    options = parser.parse_args()
    config = options.config
    torch.set_num_threads(config["threads"])
    lines = Path(config["data"]).read_text().splitlines()
    data = Dataset.from_list([json.loads(line) for line in lines])
    clock = StepClock()
    make = {"sft": make_sft, "reward": make_reward, "direct": make_direct, "ppo": make_ppo}[options.stage]
    make(config, data, AutoTokenizer.from_pretrained(config["policy"]), clock).train()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": clock.seconds(config["warmup"]), "peak_gib": peak_kib / 2**20}))


if __name__ == "__main__":
    main()

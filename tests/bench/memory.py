"""Predictions of `launch/plan.sh` beside what the stages take, on the CPU.

    python tests/bench/memory.py                # every case
    python tests/bench/memory.py "step 3"       # cases with this in their name

Each case is a few steps of a stage on a random Llama and on data whose rows are all full. Measured is
`memory/peak_gib` of its metrics: resident memory, which on the CPU is all there is. The C library is told to
give freed memory back at once. Left alone (--default_malloc) it keeps blocks below 32 MiB for later, and more
memory is resident than is in use.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from launch.plan.memory import total
from launch.plan.options import PlanOptions
from launch.plan.predict import GIB, predict
from tests.bench.fixture import make_tokenizer
from tests.ranks import run_stage

ZERO = Path(__file__).resolve().parents[2] / "common/zero_configs"
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes
STAGES = {1: "step1_sft.main", 2: "step2_reward.main", 3: "step3_ppo.main"}
PROMPT = 16  # tokens of prompts in steps 1 and 2
VOCABULARY = 8192

# Hidden size, MLP, layers, heads, key-value heads: 22, 60 and 108 million parameters.
SHAPES = {"20M": (384, 1024, 8, 6, 6), "60M": (640, 1720, 10, 10, 10), "110M": (768, 2048, 14, 12, 4)}

SHORT = {"micro_batch_size": 4, "global_batch_size": 8, "max_length": 128}
LONG = {"micro_batch_size": 8, "global_batch_size": 8, "max_length": 512}
PPO = {
    "micro_batch_size": 4, "global_batch_size": 8, "rollout_batch_size": 8, "max_prompt_length": 32,
    "max_response_length": 32,
}  # fmt: skip
PPO_LONG = {
    "micro_batch_size": 8, "global_batch_size": 8, "rollout_batch_size": 8, "max_prompt_length": 128,
    "max_response_length": 256,
}  # fmt: skip
EACH = {1: SHORT, 2: SHORT, 3: PPO}
CHECKPOINTED, ADAPTERS = {"gradient_checkpointing": True}, {"lora_rank": 8}
ONE_OF_TWO = {"critic_gradient_checkpointing": True}
NO_CRITIC, FEW_ROWS = {"advantage_estimator": "reinforce"}, {"generation_batch_size": 4}


class Case(NamedTuple):
    """A stage on a model and some ranks."""

    step: int
    shape: str
    zero: int
    ranks: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        words = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"step {self.step}, {self.shape}, zero{self.zero}, {self.ranks} ranks, {words}"


CASES = [
    *(Case(step, "60M", zero, ranks, EACH[step]) for step in EACH for zero in range(4) for ranks in (1, 2)),
    *(Case(step, "60M", zero, 2, EACH[step] | ADAPTERS) for step in EACH for zero in (0, 2, 3)),
    *(Case(step, "60M", 3, 2, EACH[step] | CHECKPOINTED) for step in EACH),
    *(Case(step, "110M", 2, 1, EACH[step]) for step in EACH),
    *(Case(step, "20M", 0, 1, LONG | more) for step in (1, 2) for more in ({}, CHECKPOINTED, ADAPTERS)),
    *(Case(3, "20M", 0, 1, PPO_LONG | more) for more in ({}, CHECKPOINTED, ADAPTERS, FEW_ROWS, ONE_OF_TWO)),
    Case(3, "60M", 0, 1, PPO | NO_CRITIC),
]


def make_models(folder: Path) -> list[str]:
    """Write a language model and a reward model of each shape; returns words that are one token."""
    tokenizer, words = make_tokenizer(random.Random(0))
    for name, (hidden, mlp, layers, heads, key_heads) in SHAPES.items():
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, num_labels=1,
        )  # fmt: skip
        torch.manual_seed(0)
        for kind, model in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
            model(config).save_pretrained(folder / name / kind)
            tokenizer.save_pretrained(folder / name / kind)
    return words


def make_data(case: Case, words: list[str], path: Path) -> None:
    """Records whose rows are as long as the options allow."""
    draw = random.Random(0)
    prompt = case.options.get("max_prompt_length", PROMPT)
    lengths = {"prompt": prompt}
    for field in {1: ["completion"], 2: ["chosen", "rejected"], 3: []}[case.step]:
        lengths[field] = case.options["max_length"] - prompt - 1  # EOS follows
    records = (
        {field: "".join(f" {draw.choice(words)}" for _ in range(n)) for field, n in lengths.items()}
        for _ in range(64)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def measure(case: Case, words: list[str], folder: Path, output: Path) -> float:
    """GiB of the first rank."""
    make_data(case, words, folder / "data.jsonl")
    model = folder / case.shape
    # DeepSpeed's stage 3 keeps weights for the backward pass when it has seen two passes in a row.
    passes = 3 if case.zero == 3 else 1
    options = {
        "zero_config": ZERO / f"zero{case.zero}.json", "output_dir": output, "max_steps": 1 + passes,
        "logging_steps": 1, "save_steps": 0, "eval_fraction": 0.0, "cache_dir": folder / "cache",
        "preprocessing_workers": 1,
    }  # fmt: skip
    if case.step == 2:
        options["share_prompts"] = "no"
    if case.step == 3:
        options |= {"actor_model_name_or_path": model / "policy", "prompt_data": folder / "data.jsonl"}
        options |= {"reward_model_name_or_path": model / "reward", "max_steps": 2, "ppo_epochs": passes}
    else:
        options |= {"model_name_or_path": model / "policy", "train_data": folder / "data.jsonl"}
    words = [word for name, value in (options | case.options).items() for word in (f"--{name}", str(value))]
    done = run_stage(STAGES[case.step], words, output, case.ranks, timeout=3600)
    if any(done.codes):
        sys.exit(f"{case.name}\n{done.output}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["memory/peak_gib"]


def expect(case: Case, folder: Path) -> tuple[str, float]:
    """What the plan says: the moment of the peak, and GiB."""
    os.environ["WORLD_SIZE"] = str(case.ranks)
    model = folder / case.shape
    options = PlanOptions(
        device="cpu", model_name_or_path=str(model / "policy"),
        reward_model_name_or_path=[str(model / "reward")],
        zero_config=str(ZERO / f"zero{case.zero}.json"), **case.options,
    )  # fmt: skip
    phase = predict(options)[f"step {case.step}"]
    return phase.name, total(phase.parts) / GIB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--default_malloc", action="store_true")
    parser.add_argument("part", nargs="?", default="", help="of the names of cases to run")
    args = parser.parse_args()
    wanted = ENVIRONMENT | ({} if args.default_malloc else GIVE_BACK)
    if not os.environ.items() >= wanted.items():  # all of it is read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        words = make_models(folder)
        print("| case | most in | predicted | measured | ratio |\n|---|---|---|---|---|")
        for number, case in enumerate(CASES):
            if args.part in case.name:
                moment, expected = expect(case, folder)
                found = measure(case, words, folder, folder / f"out{number}")
                sizes = f"{expected:.2f} | {found:.2f} | {expected / found:.2f}"
                print(f"| {case.name} | {moment} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()

"""TRL's PPO on the task of launch/recipes/stories.sh: same SFT and reward model, prompts, number of samples.

    python tests/bench/compare.py --stages ppo --steps 1 --warmup 1     # once: makes TRL's environment
    python tests/bench/stories_trl.py --stories OUTPUT_OF_RECIPE --prompts F.jsonl --output DIR \
        [--learning_rate 3e-4] [--kl_coef 0.1]

Trains on the prompts that step 3 does not hold out, one thread, and writes the policy to DIR/final. Judge it
with judge_stories.py. The seconds printed are those of training alone.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".venv-bench"
BATCH, LENGTH = 64, 48


def prepare(options: argparse.Namespace) -> None:
    """Token ids of the training prompts, as step 3 makes and parts them, to a file."""
    sys.path.insert(0, str(HERE.parents[1]))
    from functools import partial

    from common.data.loading import load_examples
    from common.runtime.options import DataOptions
    from common.text.prompts import Prompt, tokenize_prompt
    from common.text.tokenizer import SegmentEncoder, load_tokenizer

    encoder = SegmentEncoder(load_tokenizer(str(options.stories / "step1_sft" / "final")))
    convert = partial(tokenize_prompt, encoder=encoder, max_length=256, overlong="truncate_prompt")
    train, _ = load_examples([options.prompts], DataOptions(), Prompt, convert)
    options.output.mkdir(parents=True, exist_ok=True)
    ids = [train[i].ids for i in range(len(train))]
    (options.output / "prompts.json").write_text(json.dumps(ids))


def train(options: argparse.Namespace) -> None:
    """PPO with TRL 1.12, four epochs of one minibatch as in the recipe, in TRL's own environment."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    sft, reward = (str(options.stories / step / "final") for step in ("step1_sft", "step2_reward"))
    tokenizer = AutoTokenizer.from_pretrained(sft, padding_side="left")
    arguments = PPOConfig(
        output_dir=str(options.output / "trl"), per_device_train_batch_size=BATCH, num_mini_batches=1,
        total_episodes=100 * BATCH, num_ppo_epochs=4, learning_rate=options.learning_rate, adam_beta2=0.99,
        kl_coef=options.kl_coef, response_length=LENGTH, temperature=1.0, num_sample_generations=0,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        eval_strategy="no", disable_tqdm=True, logging_steps=1, seed=options.seed,
    )  # fmt: skip
    trainer = PPOTrainer(
        arguments,
        tokenizer,
        model=AutoModelForCausalLM.from_pretrained(sft),
        ref_model=AutoModelForCausalLM.from_pretrained(sft),
        reward_model=AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1),
        value_model=AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1),
        train_dataset=Dataset.from_dict(
            {"input_ids": json.loads((options.output / "prompts.json").read_text())}
        ),
    )
    start = time.perf_counter()
    trainer.train()
    print(f"{time.perf_counter() - start:.0f} s, {trainer.state.episode} responses of {LENGTH} tokens")
    trainer.policy_model.save_pretrained(options.output / "final")
    tokenizer.save_pretrained(options.output / "final")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stories", type=Path, required=True, help="Output folder of the recipe.")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--kl_coef", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if os.environ.get("PYTHONPATH") == str(ENVIRONMENT / "trl112"):
        train(options)
        return
    prepare(options)
    environment = os.environ | {"PYTHONPATH": str(ENVIRONMENT / "trl112"), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    python = ENVIRONMENT / "env" / "bin" / "python"
    sys.exit(subprocess.run([python, __file__, *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    main()

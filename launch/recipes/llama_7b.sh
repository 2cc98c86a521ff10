#!/usr/bin/env bash
# Llama 7B on A100s of 80 GB: SFT and reward model on 1 GPU, PPO on 4. All weights are trained.
#   bash launch/recipes/llama_7b.sh --data DIR --output DIR            # --model DIR_OR_HUB_ID: another of this size
# DATA holds demonstrations.jsonl, preferences.jsonl and prompts.jsonl.
set -euo pipefail
MODEL="${MODEL:-meta-llama/Llama-2-7b-hf}"
source "$(dirname "${BASH_SOURCE[0]}")/../lib/steps_by_size.sh"

# AdamW and its states are on the CPU: they do not fit on one GPU.
sft "${STEP1_GPUS:-1}" --zero_config "$ZERO/zero2_offload.json" --micro_batch_size 8 --learning_rate 1e-5
reward_model "${STEP2_GPUS:-1}" --zero_config "$ZERO/zero2_offload.json" --micro_batch_size 8 --learning_rate 9e-6
# Reference and reward model are in host memory while they do not score.
ppo "${STEP3_GPUS:-4}" --zero_config "$ZERO/zero3.json" --offload_frozen --micro_batch_size 4 \
    --generation_batch_size 16 --actor_learning_rate 3e-6 --critic_learning_rate 9e-6

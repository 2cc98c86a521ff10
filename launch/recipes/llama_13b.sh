#!/usr/bin/env bash
# Llama 13B on A100s of 80 GB: SFT and reward model on 2 GPUs, PPO on 8. All weights are trained.
#   bash launch/recipes/llama_13b.sh --data DIR --output DIR           # --model DIR_OR_HUB_ID: another of this size
# DATA holds demonstrations.jsonl, preferences.jsonl and prompts.jsonl.
set -euo pipefail
MODEL="${MODEL:-meta-llama/Llama-2-13b-hf}"
source "$(dirname "${BASH_SOURCE[0]}")/../lib/steps_by_size.sh"

# AdamW and its states are on the CPU: they do not fit on two GPUs.
sft "${STEP1_GPUS:-2}" --zero_config "$ZERO/zero2_offload.json" --micro_batch_size 8 --learning_rate 1e-5
reward_model "${STEP2_GPUS:-2}" --zero_config "$ZERO/zero2_offload.json" --micro_batch_size 8 --learning_rate 9e-6
# All weights on each GPU would leave no memory for keys and values: for every token, the GPUs gather layer by layer.
ppo "${STEP3_GPUS:-8}" --zero_config "$ZERO/zero3.json" --offload_frozen --gather_for_generation False \
    --micro_batch_size 4 --generation_batch_size 32 --actor_learning_rate 3e-6 --critic_learning_rate 9e-6

#!/usr/bin/env bash
# Llama 1B on one A100 of 40 GB: all three steps. All weights are trained.
#   bash launch/recipes/llama_1b.sh --data DIR --output DIR            # --model DIR_OR_HUB_ID: another of this size
# DATA holds demonstrations.jsonl, preferences.jsonl and prompts.jsonl.
set -euo pipefail
MODEL="${MODEL:-meta-llama/Llama-3.2-1B}"
source "$(dirname "${BASH_SOURCE[0]}")/../lib/steps_by_size.sh"

sft "${STEP1_GPUS:-1}" --zero_config "$ZERO/zero2.json" --micro_batch_size 4 --learning_rate 2e-5
reward_model "${STEP2_GPUS:-1}" --zero_config "$ZERO/zero2.json" --micro_batch_size 4 --learning_rate 9e-6
# In host memory: the critic's AdamW, which runs on the CPU, and reference and reward model while they do not score.
ppo "${STEP3_GPUS:-1}" --actor_zero_config "$ZERO/zero2.json" --critic_zero_config "$ZERO/zero2_offload.json" \
    --offload_frozen --micro_batch_size 4 --generation_batch_size 64 --actor_learning_rate 3e-6 \
    --critic_learning_rate 9e-6

#!/usr/bin/env bash
# Llama 70B with LoRA on nodes of 8 A100s of 80 GB: SFT and reward model on 8 GPUs, PPO on 32.
#   srun bash launch/recipes/llama_70b.sh --data DIR --output DIR      # --model DIR_OR_HUB_ID: another of this size
# On 4 nodes; the first two steps then use all 32 GPUs. Without Slurm: on each node, with NNODES, NODE_RANK and
# MASTER_ADDR as in launch/README.md. DATA holds demonstrations.jsonl, preferences.jsonl and prompts.jsonl.
set -euo pipefail
MODEL="${MODEL:-meta-llama/Llama-3.1-70B}"
source "$(dirname "${BASH_SOURCE[0]}")/../lib/steps_by_size.sh"

sft "${STEP1_GPUS:-8}" --lora_rank 64 --zero_config "$ZERO/zero3_nodes.json" --gather_for_generation False \
    --micro_batch_size 4 --learning_rate 1e-4
reward_model "${STEP2_GPUS:-8}" --lora_rank 64 --zero_config "$ZERO/zero3_nodes.json" --micro_batch_size 2 \
    --learning_rate 5e-5
# Two models, not four: the actor without its adapter is the reference, the critic without its own the reward model.
# Each node has a copy of both; for every token, the GPUs of a node gather layer by layer.
ppo "${STEP3_GPUS:-8}" --lora_rank 64 --zero_config "$ZERO/zero3_nodes.json" --gather_for_generation False \
    --micro_batch_size 4 --generation_batch_size 16 --actor_learning_rate 1e-5 --critic_learning_rate 5e-5

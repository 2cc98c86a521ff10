#!/usr/bin/env bash
# Llama 34B on 2 nodes of 8 A100s of 80 GB: all three steps on 16 GPUs, PPO with LoRA.
#   srun bash launch/recipes/llama_34b.sh --data DIR --output DIR      # --model DIR_OR_HUB_ID: another of this size
# Without Slurm: on each node, with NNODES, NODE_RANK and MASTER_ADDR as in launch/README.md.
# DATA holds demonstrations.jsonl, preferences.jsonl and prompts.jsonl.
set -euo pipefail
MODEL="${MODEL:-01-ai/Yi-1.5-34B}" # of the Llama family
source "$(dirname "${BASH_SOURCE[0]}")/../lib/steps_by_size.sh"

# Each node has a copy of the weights, so that layers are gathered from the GPUs of a node.
sft "${STEP1_GPUS:-8}" --zero_config "$ZERO/zero3_nodes.json" --gather_for_generation False --micro_batch_size 4 \
    --learning_rate 1e-5
reward_model "${STEP2_GPUS:-8}" --zero_config "$ZERO/zero3_nodes.json" --micro_batch_size 4 --learning_rate 5e-6
# LoRA: with all weights trained, PPO would use the last GiB of each GPU. Two models, not four: the actor without its
# adapter is the reference, the critic without its own the reward model.
ppo "${STEP3_GPUS:-8}" --lora_rank 64 --zero_config "$ZERO/zero3_nodes.json" --gather_for_generation False \
    --micro_batch_size 4 --generation_batch_size 32 --actor_learning_rate 1e-5 --critic_learning_rate 5e-5

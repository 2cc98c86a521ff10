#!/usr/bin/env bash
# GRPO from an SFT model: Llama 1B on one A100 of 40 GB; 7B on 4, 13B on 8, 34B on 16 or 70B on 32 of 80 GB.
#   SIZE=7b REWARD="--reward_function FILE.py:NAME" bash launch/recipes/llama_grpo.sh --model OUT/step1_sft/final \
#       --data DIR --output DIR
# DATA holds prompts.jsonl. REWARD may also be --reward_model_name_or_path DIR. 34B and 70B: srun, on 2 and 4 nodes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/steps_by_size.sh"
require REWARD "options that name reward functions or reward models"

case "${SIZE:-}" in
1b) grpo "${STEP3_GPUS:-1}" --zero_config "$ZERO/zero2.json" --offload_frozen ;;
7b) grpo "${STEP3_GPUS:-4}" --zero_config "$ZERO/zero3.json" --generation_batch_size 32 ;;
13b) grpo "${STEP3_GPUS:-8}" --zero_config "$ZERO/zero3.json" --offload_frozen --generation_batch_size 16 ;;
34b) grpo "${STEP3_GPUS:-8}" --zero_config "$ZERO/zero3_nodes.json" --offload_frozen --gather_for_generation False ;;
70b) grpo "${STEP3_GPUS:-8}" --zero_config "$ZERO/zero3_nodes.json" --offload_frozen --gather_for_generation False ;;
*) echo "error: SIZE ${SIZE:-}: must be 1b, 7b, 13b, 34b or 70b" >&2 && exit 2 ;;
esac

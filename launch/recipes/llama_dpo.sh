#!/usr/bin/env bash
# DPO from an SFT model: Llama 1B on one A100 of 40 GB; 7B on 1, 13B on 2, 34B on 16 or 70B (LoRA) on 8 of 80 GB.
#   SIZE=7b bash launch/recipes/llama_dpo.sh --model OUT/step1_sft/final --data DIR --output DIR
# DATA holds preferences.jsonl. 34B: srun, on 2 nodes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/steps_by_size.sh"

case "${SIZE:-}" in
1b) dpo "${STEP2_GPUS:-1}" --zero_config "$ZERO/zero2.json" --micro_batch_size 2 ;;
7b) dpo "${STEP2_GPUS:-1}" --zero_config "$ZERO/zero2_offload.json" --micro_batch_size 4 ;;
13b) dpo "${STEP2_GPUS:-2}" --zero_config "$ZERO/zero2_offload.json" --micro_batch_size 4 ;;
34b) dpo "${STEP2_GPUS:-8}" --zero_config "$ZERO/zero3_nodes.json" --micro_batch_size 2 ;;
70b) dpo "${STEP2_GPUS:-8}" --zero_config "$ZERO/zero3.json" --micro_batch_size 2 --lora_rank 64 --learning_rate 5e-6 ;;
*) echo "error: SIZE ${SIZE:-}: must be 1b, 7b, 13b, 34b or 70b" >&2 && exit 2 ;;
esac

#!/usr/bin/env bash
# Self-Instruct: SFT on short tasks written by people, with one answer each.
#   bash launch/recipes/self_instruct.sh --model DIR --data DIR --output DIR
# DATA holds demonstrations.jsonl. A tenth of the prompts is held out, and all of it is evaluated.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/environment.sh"
recipe_options "$@"

step "$HERE/step1_sft.sh" --model_name_or_path "$MODEL" --train_data "$DATA/demonstrations.jsonl" \
    --output_dir "$OUTPUT/step1_sft" --max_length 512 --num_train_epochs 3 --learning_rate 1e-3 \
    --overlong truncate_response --micro_batch_size 8 --max_eval_samples 0 --seed "$SEED"

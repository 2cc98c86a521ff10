#!/usr/bin/env bash
# Open-Assistant: replies of volunteers to learn from, and their rankings to learn what is better.
#   bash launch/recipes/oasst.sh --model DIR --data DIR --output DIR
# DATA holds demonstrations.jsonl and preferences.jsonl. What is held out of them is judged.
set -euo pipefail
SEED="${SEED:-0}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$HERE/lib/environment.sh"
recipe_options "$@"

step "$HERE/step1_sft.sh" --model_name_or_path "$MODEL" --train_data "$DATA/demonstrations.jsonl" \
    --output_dir "$OUTPUT/step1_sft" --max_length 512 --num_train_epochs 3 --learning_rate 1e-3 \
    --overlong truncate_response --micro_batch_size 8 --max_eval_samples 0 --seed "$SEED"

# A third is held out: on the tenth of so few pairs an accuracy would say nothing.
step "$HERE/step2_reward.sh" --model_name_or_path "$OUTPUT/step1_sft/final" --seed "$SEED" \
    --train_data "$DATA/preferences.jsonl" --output_dir "$OUTPUT/step2_reward" --max_length 512 \
    --num_train_epochs 2 --learning_rate 1e-3 --micro_batch_size 8 --eval_fraction 0.3 --max_eval_samples 0

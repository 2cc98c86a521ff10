#!/usr/bin/env bash
# Open-Assistant: SFT on replies of volunteers, and a reward model from their rankings.
#   bash launch/recipes/oasst.sh --model DIR --data DIR --output DIR
# DATA holds demonstrations.jsonl and preferences.jsonl. The held-out part is evaluated.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/environment.sh"
recipe_options "$@"

step "$HERE/step1_sft.sh" --model_name_or_path "$MODEL" --train_data "$DATA/demonstrations.jsonl" \
    --output_dir "$OUTPUT/step1_sft" --max_length 512 --num_train_epochs 3 --learning_rate 1e-3 \
    --overlong truncate_response --micro_batch_size 8 --max_eval_samples 0 --seed "$SEED"

# A third is held out: a tenth of so few pairs is too small to measure accuracy.
step "$HERE/step2_reward.sh" --model_name_or_path "$OUTPUT/step1_sft/final" --seed "$SEED" \
    --train_data "$DATA/preferences.jsonl" --output_dir "$OUTPUT/step2_reward" --max_length 512 \
    --num_train_epochs 2 --learning_rate 1e-3 --micro_batch_size 8 --eval_fraction 0.3 --max_eval_samples 0

#!/usr/bin/env bash
# Harmlessness: a reward model from human preferences between conversations.
#   bash launch/recipes/hh_harmless.sh --model DIR --data DIR --output DIR
# DATA holds preferences.jsonl. A tenth of the prompts is held out, and all of it is evaluated.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/environment.sh"
recipe_options "$@"

# Two epochs: in a third, a small model overfits.
step "$HERE/step2_reward.sh" --model_name_or_path "$MODEL" --train_data "$DATA/preferences.jsonl" \
    --output_dir "$OUTPUT/step2_reward" --max_length 512 --num_train_epochs 2 --learning_rate 1e-3 \
    --global_batch_size 32 --micro_batch_size 8 --max_eval_samples 0 --seed "$SEED"

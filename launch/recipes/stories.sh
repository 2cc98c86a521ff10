#!/usr/bin/env bash
# Happier stories: all three steps on a 260K-parameter Llama; a sentiment rule gives the preferences.
#   bash launch/recipes/stories.sh --model DIR --data DIR --output DIR
# DATA holds demonstrations.jsonl, preferences.jsonl and prompts.jsonl. KL_COEF is the --kl_coef of step 3.
set -euo pipefail
KL_COEF="${KL_COEF:-0.125}"
source "$(dirname "${BASH_SOURCE[0]}")/../lib/environment.sh"
recipe_options "$@"

# A low learning rate: the model writes stories already. Step 3 measures KL to the result.
step "$HERE/step1_sft.sh" --model_name_or_path "$MODEL" --train_data "$DATA/demonstrations.jsonl" \
    --output_dir "$OUTPUT/step1_sft" --max_length 256 --global_batch_size 32 --micro_batch_size 16 \
    --learning_rate 1e-4 --seed "$SEED"

# The margin of a pair is the difference in sentiment.
step "$HERE/step2_reward.sh" --model_name_or_path "$OUTPUT/step1_sft/final" --seed "$SEED" \
    --train_data "$DATA/preferences.jsonl" --output_dir "$OUTPUT/step2_reward" --num_train_epochs 3 \
    --global_batch_size 32 --micro_batch_size 32 --learning_rate 1e-3 --use_margin --eval_steps 50

# 100 iterations of 64 responses. Stories are truncated at 48 tokens by design: no penalty for a missing EOS.
step "$HERE/step3_ppo.sh" --actor_model_name_or_path "$OUTPUT/step1_sft/final" --seed "$SEED" \
    --reward_model_name_or_path "$OUTPUT/step2_reward/final" --prompt_data "$DATA/prompts.jsonl" \
    --output_dir "$OUTPUT/step3_ppo" --max_response_length 48 --missing_eos_penalty 0 --max_steps 100 \
    --rollout_batch_size 64 --global_batch_size 64 --micro_batch_size 64 --ppo_epochs 4 \
    --actor_learning_rate 2e-4 --critic_learning_rate 3e-4 --adam_beta2 0.99 --kl_coef "$KL_COEF" \
    --eval_steps 50

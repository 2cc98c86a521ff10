#!/usr/bin/env bash
# All three steps on a small synthetic task, with a report. Takes minutes on two CPU cores.
#   bash launch/quickstart.sh
set -euo pipefail
OUTPUT="${OUTPUT:-output/quickstart}" && WORLD="$OUTPUT/world"
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
script_help "$@"
install requirements.txt

# 1. SFT on demonstrations of mixed quality: right and wrong, polite and rude.
STEP1=(--model_name_or_path "$WORLD/model" --train_data "$WORLD/demonstrations.jsonl"
    --output_dir "$OUTPUT/step1_sft" --max_length 96 --max_steps 400 --global_batch_size 32 --micro_batch_size 32
    --learning_rate 5e-3 --logging_steps 50 --eval_steps 200 "$@")

# 2. Train a reward model on noisy preferences.
STEP2=(--model_name_or_path "$OUTPUT/step1_sft/final" --train_data "$WORLD/preferences.jsonl"
    --eval_data "$WORLD/preferences_heldout.jsonl" --max_eval_samples 0 --output_dir "$OUTPUT/step2_reward"
    --max_length 96 --max_steps 400 --global_batch_size 32 --micro_batch_size 32 --learning_rate 1e-3
    --logging_steps 50 --eval_steps 200 "$@")

# 3. Optimise the policy against it with PPO, near the SFT model. The gold score is not used in training.
STEP3=(--actor_model_name_or_path "$OUTPUT/step1_sft/final"
    --reward_model_name_or_path "$OUTPUT/step2_reward/final" --prompt_data "$WORLD/prompts.jsonl"
    --eval_data "$WORLD/prompts_heldout.jsonl" --output_dir "$OUTPUT/step3_ppo" --max_response_length 64
    --max_steps 60 --rollout_batch_size 128 --global_batch_size 64 --micro_batch_size 64 --ppo_epochs 2
    --actor_learning_rate 3e-4 --critic_learning_rate 1e-3 --kl_coef 0.05 --logging_steps 5 "$@")

[ $# = 0 ] || check step1_sft "${STEP1[@]}" -- step2_reward "${STEP2[@]}" -- step3_ppo "${STEP3[@]}"
mkdir -p "$OUTPUT"
started=$SECONDS
step "$HERE/quickstart/build.py" --output_dir "$WORLD"
step "$HERE/step1_sft.sh" "${STEP1[@]}"
step1=$SECONDS
step "$HERE/step2_reward.sh" "${STEP2[@]}"
step2=$SECONDS
step "$HERE/step3_ppo.sh" "${STEP3[@]}"
step3=$SECONDS
step "$HERE/quickstart/report.py" --quickstart_dir "$OUTPUT" \
    --seconds $((step1 - started)) $((step2 - step1)) $((step3 - step2))

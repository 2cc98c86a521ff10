# Sourced by recipes that name the hardware: each step as a function of GPUs per machine and of the options that a
# size of model needs. STEP1_OPTIONS, STEP2_OPTIONS, STEP3_OPTIONS and DIRECT_OPTIONS come last.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ZERO="$ROOT/common/zero_configs"
recipe_options "$@"
install requirements.txt
check step1_sft ${STEP1_OPTIONS:-} -- step2_reward ${STEP2_OPTIONS:-} -- step2_direct ${DIRECT_OPTIONS:-} \
    -- step3_ppo ${STEP3_OPTIONS:-}

sft() {
    NUM_GPUS="$1" step "$HERE/step1_sft.sh" --model_name_or_path "$MODEL" --seed "$SEED" \
        --train_data "$DATA/demonstrations.jsonl" --output_dir "$OUTPUT/step1_sft" --max_length 2048 \
        --num_train_epochs 2 --global_batch_size 64 --gradient_checkpointing "${@:2}" ${STEP1_OPTIONS:-}
}

reward_model() {
    NUM_GPUS="$1" step "$HERE/step2_reward.sh" --model_name_or_path "$OUTPUT/step1_sft/final" --seed "$SEED" \
        --train_data "$DATA/preferences.jsonl" --output_dir "$OUTPUT/step2_reward" --max_length 2048 \
        --global_batch_size 64 --gradient_checkpointing "${@:2}" ${STEP2_OPTIONS:-}
}

ppo() {
    NUM_GPUS="$1" step "$HERE/step3_ppo.sh" --actor_model_name_or_path "$OUTPUT/step1_sft/final" --seed "$SEED" \
        --reward_model_name_or_path "$OUTPUT/step2_reward/final" --prompt_data "$DATA/prompts.jsonl" \
        --output_dir "$OUTPUT/step3_ppo" --max_prompt_length 256 --max_response_length 512 \
        --rollout_batch_size 512 --global_batch_size 128 --gradient_checkpointing "${@:2}" ${STEP3_OPTIONS:-}
}

# grpo GPUS OPTIONS...: step 3 without a critic, from the SFT model MODEL. REWARD: options that name the rewards.
grpo() {
    NUM_GPUS="$1" step "$HERE/step3_ppo.sh" --actor_model_name_or_path "$MODEL" --seed "$SEED" $REWARD \
        --prompt_data "$DATA/prompts.jsonl" --output_dir "$OUTPUT" --max_prompt_length 256 \
        --max_response_length 512 --advantage_estimator group --samples_per_prompt 8 --kl_penalty k3 --kl_coef 0.04 \
        --ppo_epochs 1 --rollout_batch_size 512 --global_batch_size 128 --gradient_checkpointing "${@:2}" \
        ${STEP3_OPTIONS:-}
}

# dpo GPUS OPTIONS...: from the SFT model MODEL.
dpo() {
    NUM_GPUS="$1" step "$HERE/step2_direct.sh" --model_name_or_path "$MODEL" --seed "$SEED" \
        --train_data "$DATA/preferences.jsonl" --output_dir "$OUTPUT" --max_length 2048 \
        --global_batch_size 64 --gradient_checkpointing "${@:2}" ${DIRECT_OPTIONS:-}
}

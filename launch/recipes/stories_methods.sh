#!/usr/bin/env bash
# Eleven methods from one SFT model to happier stories, with a table of results and costs.
#   bash launch/recipes/stories_methods.sh --model DIR --data DIR --output DIR
# DATA as in stories.sh. GOLD, FILE.py:NAME, is the gold function: for evaluation, and for the scores of ILQL.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../lib/environment.sh"
GOLD="${GOLD:-$ROOT/tests/bench/gold.py:sentiment}"
install requirements.txt tests/requirements.txt # the second one has VADER, which GOLD uses
recipe_options "$@"
mkdir -p "$OUTPUT"
ALL="$OUTPUT" PROMPTS="$DATA/prompts.jsonl" TIMES="$OUTPUT/times.txt"
RESPONSES=(--max_response_length 48 --seed "$SEED" --reward_model_name_or_path "$ALL/step2_reward/final")
# SFT, reward model and PPO as in stories.sh. RLOO samples as many responses, four per prompt.
export MODEL TIMES PROMPTS OUTPUT
step "$HERE/recipes/stories.sh" "$@"
MODEL="$ALL/step1_sft/final"
step "$HERE/step3_ppo.sh" --actor_model_name_or_path "$MODEL" --prompt_data "$PROMPTS" "${RESPONSES[@]}" \
    --output_dir "$ALL/rloo" --advantage_estimator rloo --samples_per_prompt 4 --missing_eos_penalty 0 \
    --max_steps 100 --rollout_batch_size 64 --global_batch_size 64 --micro_batch_size 64 --ppo_epochs 4 \
    --actor_learning_rate 1e-4 --adam_beta2 0.99 --kl_coef 0.125 --eval_steps 50
# Direct preference optimisation. With these --beta and learning rates, all end at a KL close to that of PPO.
for loss in "dpo 0.3 1e-4" "ipo 3 2e-4" "kto 0.2 1e-4" "orpo 2 1e-4" "simpo 2 5e-5"; do
    read -r name beta rate <<<"$loss"
    step "$HERE/step2_direct.sh" --model_name_or_path "$MODEL" --train_data "$DATA/preferences.jsonl" \
        --output_dir "$ALL/$name" --loss "$name" --beta "$beta" --learning_rate "$rate" --seed "$SEED" \
        --num_train_epochs 3 --global_batch_size 32 --micro_batch_size 16
done
step "$HERE/recipes/scored_responses.py" "$GOLD" "$DATA/preferences.jsonl" "$ALL/scored.jsonl"
step "$HERE/step2_ilql.sh" --model_name_or_path "$MODEL" --train_data "$ALL/scored.jsonl" --output_dir "$ALL/ilql" \
    --learning_rate 3e-3 --lora_rank 8 --num_train_epochs 4 --global_batch_size 32 --micro_batch_size 32 --seed "$SEED" \
    --gamma 1 --alpha 0.5 --steps_for_target_q_sync 1 --cql_scale 0.01 --awac_scale 0.1 --ilql_beta 8
# Rejection sampling, with as many responses as PPO; they are truncated at 48 tokens by design.
SAMPLES="--keep_truncated True --samples_per_prompt 8 --prompts_per_round"
export STEP1_OPTIONS="--learning_rate 4e-4 --global_batch_size 32 --micro_batch_size 32 --max_length 256 --seed $SEED"
OUTPUT="$ALL/raft" SAMPLE_OPTIONS="$SAMPLES 266" step "$HERE/raft.sh" "${RESPONSES[@]}"
OUTPUT="$ALL/rest" SAMPLE_OPTIONS="$SAMPLES 800" step "$HERE/rest.sh" "${RESPONSES[@]}"
step "$HERE/evaluate_ppo.sh" --model_name_or_path "$MODEL" "$ALL"/{step3_ppo,rloo,dpo,ipo,kto,orpo,simpo,ilql,raft,rest}/final \
    --prompt_data "$PROMPTS" "${RESPONSES[@]}" --max_eval_samples 0 --gold_function "$GOLD" --max_length 512 \
    --output_dir "$ALL/report" --demonstration_data "$DATA/demonstrations.jsonl"
step "$HERE/recipes/methods_table.py" "$ALL"

#!/usr/bin/env bash
# All three steps: a pretrained model and three data files -> an aligned model in OUTPUT/step3_ppo/final
#   MODEL=DIR DEMONSTRATIONS=F1 PREFERENCES=F2 PROMPTS=F3 OUTPUT=OUT bash launch/pipeline.sh --zero_config F.json
# STEP1_OPTIONS, STEP2_OPTIONS and STEP3_OPTIONS go to one step each; options on the command line go to all three.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
script_help "$@"
require MODEL "the folder or hub name of a pretrained model"
require DEMONSTRATIONS "data for step 1"
require PREFERENCES "data for step 2"
require PROMPTS "data for step 3"
OUTPUT="${OUTPUT:-output/pipeline}"
install requirements.txt

STEP1=(--model_name_or_path "$MODEL" --train_data "$DEMONSTRATIONS" --output_dir "$OUTPUT/step1_sft"
    ${STEP1_OPTIONS:-} "$@")
STEP2=(--model_name_or_path "$OUTPUT/step1_sft/final" --train_data "$PREFERENCES"
    --output_dir "$OUTPUT/step2_reward" ${STEP2_OPTIONS:-} "$@")
STEP3=(--actor_model_name_or_path "$OUTPUT/step1_sft/final" --prompt_data "$PROMPTS"
    --reward_model_name_or_path "$OUTPUT/step2_reward/final" --output_dir "$OUTPUT/step3_ppo"
    ${STEP3_OPTIONS:-} "$@")
check step1_sft "${STEP1[@]}" -- step2_reward "${STEP2[@]}" -- step3_ppo "${STEP3[@]}"

step "$HERE/step1_sft.sh" "${STEP1[@]}"
step "$HERE/step2_reward.sh" "${STEP2[@]}"
step "$HERE/step3_ppo.sh" "${STEP3[@]}"

#!/usr/bin/env bash
# All three steps in a row: a pretrained model and three files -> an aligned model in OUTPUT/step3_ppo/final
#   MODEL=DIR DEMONSTRATIONS=F1 PREFERENCES=F2 PROMPTS=F3 OUTPUT=OUT bash launch/pipeline.sh --zero_config F.json
# STEP1_OPTIONS, STEP2_OPTIONS and STEP3_OPTIONS go to one step each, options on the command line to all three.
set -euo pipefail
MODEL="${MODEL:?the folder or hub name of a pretrained model}"
DEMONSTRATIONS="${DEMONSTRATIONS:?data for step 1}"
PREFERENCES="${PREFERENCES:?data for step 2}"
PROMPTS="${PROMPTS:?data for step 3}"
OUTPUT="${OUTPUT:-output/pipeline}"
HERE="$(dirname "${BASH_SOURCE[0]}")"
source "$HERE/environment.sh"

step "$HERE/step1_sft.sh" --model_name_or_path "$MODEL" --train_data "$DEMONSTRATIONS" \
    --output_dir "$OUTPUT/step1_sft" ${STEP1_OPTIONS:-} "$@"

step "$HERE/step2_reward.sh" --model_name_or_path "$OUTPUT/step1_sft/final" --train_data "$PREFERENCES" \
    --output_dir "$OUTPUT/step2_reward" ${STEP2_OPTIONS:-} "$@"

step "$HERE/step3_ppo.sh" --actor_model_name_or_path "$OUTPUT/step1_sft/final" \
    --reward_model_name_or_path "$OUTPUT/step2_reward/final" --prompt_data "$PROMPTS" \
    --output_dir "$OUTPUT/step3_ppo" ${STEP3_OPTIONS:-} "$@"

#!/usr/bin/env bash
# Iterative DPO: each round trains on pairs of the best and the worst of the policy's own responses
#   MODEL=OUT1/final PROMPTS=F.jsonl bash launch/iterative_dpo.sh --reward_model_name_or_path OUT2/final
# Options on the command line go to sampling and the report; SAMPLE_OPTIONS, DIRECT_OPTIONS and EVALUATE_OPTIONS
# to one command each. MODEL is the reference in every round, which keeps all rounds near it: Xiong et al. 2023
# (arXiv 2312.11456). So the --loss in DIRECT_OPTIONS must be one with a reference.
set -euo pipefail
ROUNDS="${ROUNDS:-3}"
LATER=(step2_direct --reference_model_name_or_path "${MODEL:-}" --eval_fraction 0 ${DIRECT_OPTIONS:-})
source "$(dirname "${BASH_SOURCE[0]}")/lib/rounds.sh" "$@"

policies=("$MODEL")
for round in $(seq "$ROUNDS"); do
    here="$OUTPUT/round_$round"
    sample "$round" "${policies[-1]}" "$here/samples" --pairs worst
    step "$HERE/step2_direct.sh" --model_name_or_path "${policies[-1]}" --reference_model_name_or_path "$MODEL" \
        --train_data "$here/samples/preferences.jsonl" --output_dir "$here/step2_direct" --eval_fraction 0 \
        ${DIRECT_OPTIONS:-}
    policies+=("$here/step2_direct/final")
done
finish "${policies[@]}"

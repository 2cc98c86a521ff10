#!/usr/bin/env bash
# RAFT: in each round the policy learns from the best of its own n responses to each prompt -> OUTPUT/final
#   MODEL=OUT1/final PROMPTS=F.jsonl OUTPUT=OUT bash launch/raft.sh --reward_model_name_or_path OUT2/final
# Options on the command line go to sampling and the report, SAMPLE_OPTIONS, STEP1_OPTIONS and EVALUATE_OPTIONS
# to one command each. Each round goes on from the one before: Dong et al. 2023 (arXiv 2304.06767), algorithm 1.
set -euo pipefail
ROUNDS="${ROUNDS:-3}"
LATER=(step1_sft --eval_fraction 0 ${STEP1_OPTIONS:-})  # the command that wrong options would reach hours later
source "$(dirname "${BASH_SOURCE[0]}")/lib/rounds.sh" "$@"

policies=("$MODEL")
for round in $(seq "$ROUNDS"); do
    here="$OUTPUT/round_$round"
    sample "$round" "${policies[-1]}" "$here/samples" --keep best
    learn "${policies[-1]}" "$here/samples" "$here/step1_sft"
    policies+=("$here/step1_sft/final")
done
finish "${policies[@]}"

#!/usr/bin/env bash
# RAFT: each round trains on the best of the policy's own n responses per prompt -> OUTPUT/final
#   MODEL=OUT1/final PROMPTS=F.jsonl OUTPUT=OUT bash launch/raft.sh --reward_model_name_or_path OUT2/final
# Options on the command line go to sampling and the report; SAMPLE_OPTIONS, STEP1_OPTIONS and EVALUATE_OPTIONS
# to one command each. Each round starts from the policy of the last one: Dong et al. 2023 (arXiv 2304.06767),
# algorithm 1.
set -euo pipefail
ROUNDS="${ROUNDS:-3}"
LATER=(step1_sft --eval_fraction 0 ${STEP1_OPTIONS:-})  # a command that starts hours later: check its options now
source "$(dirname "${BASH_SOURCE[0]}")/lib/rounds.sh" "$@"

policies=("$MODEL")
for round in $(seq "$ROUNDS"); do
    here="$OUTPUT/round_$round"
    sample "$round" "${policies[-1]}" "$here/samples" --keep best
    train "${policies[-1]}" "$here/samples" "$here/step1_sft"
    policies+=("$here/step1_sft/final")
done
finish "${policies[@]}"

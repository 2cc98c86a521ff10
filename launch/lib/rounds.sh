#!/usr/bin/env bash
# Sourced by raft.sh, rest.sh, iterative_dpo.sh and lib/online.sh: functions for their rounds.
# Every command resumes, and so the loop does too: a finished command may load its model again, but does no work.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
script_help "$@"
require MODEL "the policy to start from: final/ of step 1"
require PROMPTS "prompts, as for step 3"
[[ "$ROUNDS" =~ ^[1-9][0-9]*$ ]] || { echo "error: ROUNDS $ROUNDS: must be a whole number above 0" >&2 && exit 2; }
OUTPUT="${OUTPUT:-output/$(basename "$0" .sh)}"
DEMONSTRATIONS="${DEMONSTRATIONS:-}"  # mixed into the data of every round, as F.jsonl:0.1; empty: none
COMMON=("$@")  # options of sampling and of the report
install requirements.txt
check "${LATER[@]}" -- evaluate_ppo --prompt_data "$PROMPTS" ${EVALUATE_OPTIONS:-} "$@"

# sample ROUND POLICY SELECTION_DIR OPTIONS...: write responses to OUTPUT/round_ROUND/samples, and a selection.
sample() {
    step "$HERE/best_of_n.sh" --model_name_or_path "$2" --prompt_data "$PROMPTS" --round "$1" \
        --output_dir "$OUTPUT/round_$1/samples" --selection_dir "$3" "${@:4}" \
        ${SAMPLE_OPTIONS:-} "${COMMON[@]}"
}

# train POLICY DATA_DIR OUTPUT_DIR: step 1. The data contains no held-out prompts of step 3.
train() {
    step "$HERE/step1_sft.sh" --model_name_or_path "$1" --output_dir "$3" --eval_fraction 0 \
        --train_data "$2/demonstrations.jsonl" ${DEMONSTRATIONS:+"$DEMONSTRATIONS"} ${STEP1_OPTIONS:-}
}

# finish POLICY...: link the last one to OUTPUT/final; compare all of them on held-out prompts with the first.
finish() {
    local last="${*: -1}"
    ln -sfn "${last#"$OUTPUT/"}" "$OUTPUT/final"
    step "$HERE/evaluate_ppo.sh" --model_name_or_path "$@" --prompt_data "$PROMPTS" \
        --output_dir "$OUTPUT/report" ${EVALUATE_OPTIONS:-} "${COMMON[@]}"
}

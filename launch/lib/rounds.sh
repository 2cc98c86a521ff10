#!/usr/bin/env bash
# Sourced by raft.sh, rest.sh and iterative_dpo.sh: what their rounds have in common.
# Each command goes on where it was stopped, and so does the whole loop: one that is done may load its model again,
# but has nothing more to draw or to learn.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
HERE="$ROOT/launch"
script_help "$@"
require MODEL "the policy to start from: final/ of step 1"
require PROMPTS "prompts, as for step 3"
OUTPUT="${OUTPUT:-output/$(basename "$0" .sh)}"
DEMONSTRATIONS="${DEMONSTRATIONS:-}"  # to learn from in every round besides, as F.jsonl:0.1; empty: none
COMMON=("$@")  # options of sampling and of the report
install requirements.txt
check "${LATER[@]}" -- evaluate_ppo --prompt_data "$PROMPTS" ${EVALUATE_OPTIONS:-} "$@"

# sample ROUND POLICY SELECTION_DIR OPTIONS...: responses to OUTPUT/round_ROUND/samples, and a choice of them.
sample() {
    step "$HERE/best_of_n.sh" --model_name_or_path "$2" --prompt_data "$PROMPTS" --round "$1" \
        --output_dir "$OUTPUT/round_$1/samples" --selection_dir "$3" "${@:4}" \
        ${SAMPLE_OPTIONS:-} "${COMMON[@]}"
}

# learn POLICY DATA_DIR OUTPUT_DIR: step 1. The prompts that step 3 holds out are not in the data.
learn() {
    step "$HERE/step1_sft.sh" --model_name_or_path "$1" --output_dir "$3" --eval_fraction 0 \
        --train_data "$2/demonstrations.jsonl" ${DEMONSTRATIONS:+"$DEMONSTRATIONS"} ${STEP1_OPTIONS:-}
}

# finish POLICY...: the last one is OUTPUT/final; all of them on held-out prompts, against the first.
finish() {
    local last="${*: -1}"
    ln -sfn "${last#"$OUTPUT/"}" "$OUTPUT/final"
    step "$HERE/evaluate_ppo.sh" --model_name_or_path "$@" --prompt_data "$PROMPTS" \
        --output_dir "$OUTPUT/report" ${EVALUATE_OPTIONS:-} "${COMMON[@]}"
}

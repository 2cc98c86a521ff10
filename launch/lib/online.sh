#!/usr/bin/env bash
# Sourced by online.sh: the parts of a round, which write to the folder $here. Each resumes, or does no work again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
script_help "$@"
allow LABELS judge annotate gold && allow METHOD ppo dpo
[ "$LABELS" != judge ] || require JUDGE "the model that compares responses"
[ "$LABELS" != gold ] || require GOLD "the function that scores responses, FILE.py:NAME"
[ "$LABELS" != gold ] || [ -z "${LABEL_OPTIONS:-}" ] ||
    { echo "error: launch/online.sh: LABEL_OPTIONS has no effect with LABELS=gold" >&2 && exit 2; }
LATER=(sample_pairs ${SAMPLE_OPTIONS:-} "$@" -- evaluate_reward ${SHIFT_OPTIONS:-} -- step2_reward ${STEP2_OPTIONS:-})
[ "$LABELS" = gold ] || LATER+=(-- "$LABELS" ${LABEL_OPTIONS:-})
[ "$METHOD" = ppo ] || LATER+=(-- step2_direct --eval_fraction 0 ${DIRECT_OPTIONS:-})
[ "$METHOD" = dpo ] || LATER+=(-- step3_ppo ${STEP3_OPTIONS:-} "$@")
RESPONSES=("$@") GOLD_OPTIONS=(${GOLD:+--gold_function "$GOLD"})
# In the report, the last reward model scores the policies of all rounds.
source "$HERE/lib/rounds.sh" --reward_model_name_or_path "$OUTPUT/round_$ROUNDS/step2_reward/final" "${GOLD_OPTIONS[@]}" "$@"
[ -z "${GOLD:-}" ] || heed python "$HERE/online/label.py" "${GOLD_OPTIONS[@]}" # without pairs: is it there?

label_pairs() {
    local pairs="$here/pairs/pairs.jsonl" labels="$here/labels/preferences.jsonl"
    mkdir -p "$here/labels"
    case "$LABELS" in
    judge) once "$here/labels/report.json" judge.sh --model_name_or_path "$JUDGE" --preference_data "$pairs" \
        --output_dir "$here/labels" ${LABEL_OPTIONS:-} ;;
    annotate) step "$HERE/annotate.sh" --pair_data "$pairs" --output "$labels" --until_answered ${LABEL_OPTIONS:-} ;;
    gold) once "$labels" online/label.py "${GOLD_OPTIONS[@]}" --pair_data "$pairs" --output "$labels" ;;
    esac
}

train_policy() {
    case "$METHOD" in
    dpo) step "$HERE/step2_direct.sh" --model_name_or_path "$MODEL" --train_data "$@" --output_dir "$here/policy" \
        --eval_fraction 0 ${DIRECT_OPTIONS:-} ;;
    ppo) step "$HERE/step3_ppo.sh" --actor_model_name_or_path "$MODEL" --prompt_data "$PROMPTS" \
        --reward_model_name_or_path "$here/step2_reward/final" --output_dir "$here/policy" "${GOLD_OPTIONS[@]}" \
        ${STEP3_OPTIONS:-} "${RESPONSES[@]}" ;;
    esac
}

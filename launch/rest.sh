#!/usr/bin/env bash
# ReST: in each round (Grow) the policy learns from its own responses above a threshold that rises (Improve)
#   MODEL=OUT1/final PROMPTS=F.jsonl OUTPUT=OUT bash launch/rest.sh --reward_model_name_or_path OUT2/final
# Options on the command line go to sampling and the report, SAMPLE_OPTIONS, STEP1_OPTIONS and EVALUATE_OPTIONS
# to one command each. A round samples once, and each threshold goes on from the policy of the one before:
# Gulcehre et al. 2023 (arXiv 2308.08998), algorithm 1. There the data of step 1 are mixed in: DEMONSTRATIONS.
set -euo pipefail
ROUNDS="${ROUNDS:-1}"
QUANTILES="${QUANTILES:-0.5 0.75 0.9}"  # the thresholds: shares of the responses that score less
LATER=(step1_sft --eval_fraction 0 ${STEP1_OPTIONS:-})  # the command that wrong options would reach hours later
source "$(dirname "${BASH_SOURCE[0]}")/lib/rounds.sh" "$@"

policies=("$MODEL")
for round in $(seq "$ROUNDS"); do
    here="$OUTPUT/round_$round"
    grown="${policies[-1]}"
    for quantile in $QUANTILES; do
        sample "$round" "$grown" "$here/above_$quantile" --keep quantile --quantile "$quantile"
        learn "${policies[-1]}" "$here/above_$quantile" "$here/above_$quantile/step1_sft"
        policies+=("$here/above_$quantile/step1_sft/final")
    done
done
finish "${policies[@]}"

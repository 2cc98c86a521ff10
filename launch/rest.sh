#!/usr/bin/env bash
# ReST: each round samples responses (Grow), then trains on those above a rising threshold (Improve)
#   MODEL=OUT1/final PROMPTS=F.jsonl OUTPUT=OUT bash launch/rest.sh --reward_model_name_or_path OUT2/final
# Options on the command line go to sampling and the report; SAMPLE_OPTIONS, STEP1_OPTIONS and EVALUATE_OPTIONS
# to one command each. A round samples once; each threshold starts from the policy of the previous one: Gulcehre
# et al. 2023 (arXiv 2308.08998), algorithm 1. As there, DEMONSTRATIONS mixes in the data of step 1.
set -euo pipefail
ROUNDS="${ROUNDS:-1}"
QUANTILES="${QUANTILES:-0.5 0.75 0.9}"  # thresholds, as quantiles of the scores
LATER=(step1_sft --eval_fraction 0 ${STEP1_OPTIONS:-})  # a command that starts hours later: check its options now
source "$(dirname "${BASH_SOURCE[0]}")/lib/rounds.sh" "$@"

policies=("$MODEL")
for round in $(seq "$ROUNDS"); do
    here="$OUTPUT/round_$round"
    sampler="${policies[-1]}"
    for quantile in $QUANTILES; do
        sample "$round" "$sampler" "$here/above_$quantile" --keep quantile --quantile "$quantile"
        train "${policies[-1]}" "$here/above_$quantile" "$here/above_$quantile/step1_sft"
        policies+=("$here/above_$quantile/step1_sft/final")
    done
done
finish "${policies[@]}"

#!/usr/bin/env bash
# Online RLHF: each round samples from the newest policy, collects preferences, and trains on all pairs so far
#   MODEL=OUT1/final PROMPTS=F.jsonl LABELS=judge JUDGE=M OUTPUT=OUT bash launch/online.sh --max_response_length 256
# LABELS is judge (the model JUDGE), annotate (people, on the page whose address is printed) or gold (the function
# GOLD, FILE.py:NAME). METHOD is ppo or dpo. PREFERENCES: pairs from before, mixed into every round.
# Options on the command line go to sampling, PPO and the report; SAMPLE_OPTIONS, LABEL_OPTIONS, SHIFT_OPTIONS,
# STEP2_OPTIONS, STEP3_OPTIONS or DIRECT_OPTIONS, and EVALUATE_OPTIONS to one command each. Reward model and policy
# start from MODEL in every round: Bai et al. 2022 (arXiv 2204.05862), section 4.5.
set -euo pipefail
ROUNDS="${ROUNDS:-3}" LABELS="${LABELS:-}" METHOD="${METHOD:-ppo}" OUTPUT="${OUTPUT:-output/online}"
source "$(dirname "${BASH_SOURCE[0]}")/lib/online.sh" "$@"

policies=("$MODEL") pairs=(${PREFERENCES:+"$PREFERENCES"})
for round in $(seq "$ROUNDS"); do
    here="$OUTPUT/round_$round"
    # 1. Sample pairs of responses from the newest policy; held-out prompts are left out. 2. Label them.
    once "$here/pairs/pairs.jsonl" sample_pairs.sh --model_name_or_path "${policies[-1]}" --prompt_data "$PROMPTS" \
        --round "$round" --output_dir "$here/pairs" --eval_fraction 0.1 ${SAMPLE_OPTIONS:-} "$@"
    label_pairs
    # 3. Is the last reward model right about the policy that was trained against it?
    [ "$round" = 1 ] || once "$here/shift/report.json" evaluate_reward.sh --output_dir "$here/shift" ${SHIFT_OPTIONS:-} \
        --eval_data "$here/labels/preferences.jsonl" --reward_model_name_or_path "$last/step2_reward/final"
    # 4. Train a reward model and a policy on old and new pairs. The hashes of
    # sampled prompts are from 0.1 to 1, so that 0.2 holds out a ninth.
    pairs+=("$here/labels/preferences.jsonl") last="$here"
    step "$HERE/step2_reward.sh" --model_name_or_path "$MODEL" --train_data "${pairs[@]}" \
        --output_dir "$here/step2_reward" --eval_fraction 0.2 ${STEP2_OPTIONS:-}
    train_policy "${pairs[@]}"
    policies+=("$here/policy/final")
    step "$HERE/online/table.py" --output_dir "$OUTPUT"
done
finish "${policies[@]}"
step "$HERE/online/table.py" --output_dir "$OUTPUT"

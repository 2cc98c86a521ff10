#!/usr/bin/env bash
# Compare policies on held-out prompts: scores, win rates, KL, diversity, forgetting, best of n
#   bash launch/evaluate_ppo.sh --model_name_or_path OUT1/final OUT3/final --prompt_data F.jsonl \
#       --reward_model_name_or_path OUT2/final --output_dir DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step3_ppo.compare.main output/evaluate_ppo "$@"

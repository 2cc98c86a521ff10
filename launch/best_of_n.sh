#!/usr/bin/env bash
# Rejection sampling: draw and score n responses per prompt; write the best as data for steps 1 and 2
#   bash launch/best_of_n.sh --model_name_or_path OUT1/final --prompt_data F.jsonl \
#       --reward_model_name_or_path OUT2/final --output_dir DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step3_ppo.best_of_n.main output/best_of_n "$@"

#!/usr/bin/env bash
# Evaluate a reward model, or an ensemble, on preferences: accuracy, calibration, length bias, verdicts
#   bash launch/evaluate_reward.sh --reward_model_name_or_path OUT2/final --eval_data F.jsonl --output_dir DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step2_reward.evaluation.main output/evaluate_reward "$@"

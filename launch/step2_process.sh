#!/usr/bin/env bash
# Step 2, process reward model: SFT model + labelled steps -> OUT/final
#   bash launch/step2_process.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step2_reward.process.main output/step2_process "$@"

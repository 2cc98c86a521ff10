#!/usr/bin/env bash
# Step 2, reward model: SFT model + preferences -> OUT/final
#   bash launch/step2_reward.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step2_reward.main output/step2_reward "$@"

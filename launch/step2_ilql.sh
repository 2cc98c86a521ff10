#!/usr/bin/env bash
# Step 2, ILQL: SFT model + scored responses -> policy and Q heads in OUT/final
#   bash launch/step2_ilql.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step2_reward.ilql.main output/step2_ilql "$@"

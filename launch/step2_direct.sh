#!/usr/bin/env bash
# Step 2, direct preference optimisation: SFT model + preferences -> policy in OUT/final
#   bash launch/step2_direct.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step2_reward.direct.main output/step2_direct "$@"

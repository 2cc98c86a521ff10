#!/usr/bin/env bash
# Step 1, supervised fine-tuning: pretrained model + demonstrations -> OUT/final
#   bash launch/step1_sft.sh --model_name_or_path DIR_OR_HUB_ID --train_data F.jsonl --output_dir OUT
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step1_sft.main output/step1_sft "$@"

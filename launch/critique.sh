#!/usr/bin/env bash
# AI feedback: a model criticises and revises its answers by a constitution -> demonstrations for step 1
#   bash launch/critique.sh --model_name_or_path DIR_OR_HUB_ID --prompt_data F.jsonl --output_dir DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step1_sft.critique output/critique "$@"

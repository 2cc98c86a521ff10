#!/usr/bin/env bash
# AI feedback: a model compares two responses by a constitution -> preferences for step 2, and agreement with people
#   bash launch/judge.sh --model_name_or_path DIR_OR_HUB_ID --preference_data F.jsonl --output_dir DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step2_reward.judge.main output/judge "$@"

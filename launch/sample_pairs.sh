#!/usr/bin/env bash
# Sample pairs of responses for human feedback: two or more per prompt, from one checkpoint or two
#   bash launch/sample_pairs.sh --model_name_or_path OUT1/final OUT3/final --prompt_data F.jsonl --output_dir DIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step2_reward.annotate.sample_pairs output/sample_pairs "$@"

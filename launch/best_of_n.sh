#!/usr/bin/env bash
# Rejection sampling: draw and score n responses per prompt; write the best as data for steps 1 and 2
#   bash launch/best_of_n.sh --model_name_or_path OUT1/final --prompt_data F.jsonl \
#       --reward_model_name_or_path OUT2/final --output_dir DIR
set -euo pipefail
NUM_GPUS="${NUM_GPUS:-}"              # ranks per machine; empty: all GPUs, or one rank on the CPU
ZERO_CONFIG="${ZERO_CONFIG:-}"        # DeepSpeed JSON; empty: zero2 on GPUs, zero0 on the CPU
HOSTFILE="${HOSTFILE:-}"              # DeepSpeed's list of machines; empty: this one
MASTER_PORT="${MASTER_PORT:-}"        # where the ranks meet; empty: a free port, or 29500 with a HOSTFILE

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
run_stage step3_ppo.best_of_n.main output/best_of_n ${ZERO_CONFIG:+--zero_config "$ZERO_CONFIG"} "$@"

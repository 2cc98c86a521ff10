#!/usr/bin/env bash
# AI feedback: a model criticises and revises its answers by a constitution -> demonstrations for step 1
#   bash launch/critique.sh --model_name_or_path DIR_OR_HUB_ID --prompt_data F.jsonl --output_dir DIR
set -euo pipefail
NUM_GPUS="${NUM_GPUS:-}"              # ranks per machine; empty: all GPUs, or one rank on the CPU
ZERO_CONFIG="${ZERO_CONFIG:-}"        # DeepSpeed JSON; empty: zero2 on GPUs, zero0 on the CPU
HOSTFILE="${HOSTFILE:-}"              # DeepSpeed's list of machines; empty: this one
MASTER_PORT="${MASTER_PORT:-}"        # where the ranks meet; empty: a free port, or 29500 with a HOSTFILE

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
run_stage step1_sft.critique output/critique ${ZERO_CONFIG:+--zero_config "$ZERO_CONFIG"} "$@"

#!/usr/bin/env bash
# Step 2, direct preference optimisation: SFT model + preferences -> policy in OUT/final
#   bash launch/step2_direct.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT
set -euo pipefail
NUM_GPUS="${NUM_GPUS:-}"              # ranks per machine; empty: all GPUs, or one rank on the CPU
ZERO_CONFIG="${ZERO_CONFIG:-}"        # DeepSpeed JSON; empty: zero2 on GPUs, zero0 on the CPU
HOSTFILE="${HOSTFILE:-}"              # DeepSpeed's list of machines; empty: this one
MASTER_PORT="${MASTER_PORT:-}"        # where the ranks meet; empty: a free port, or 29500 with a HOSTFILE

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
run_stage step2_reward.direct.main output/step2_direct ${ZERO_CONFIG:+--zero_config "$ZERO_CONFIG"} "$@"

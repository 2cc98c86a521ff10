#!/usr/bin/env bash
# Evaluate language models on the same demonstrations: perplexity and sample responses, in one table
#   bash launch/evaluate_sft.sh --model_name_or_path DIR_OR_HUB_ID ... --eval_data F.jsonl --output FIGURES.json
set -euo pipefail
NUM_GPUS="${NUM_GPUS:-}"              # ranks per machine; empty: all GPUs, or one rank on the CPU
ZERO_CONFIG="${ZERO_CONFIG:-}"        # DeepSpeed JSON; empty: zero2 on GPUs, zero0 on the CPU
HOSTFILE="${HOSTFILE:-}"              # DeepSpeed's list of machines; empty: this one
MASTER_PORT="${MASTER_PORT:-}"        # where the ranks meet; empty: a free port, or 29500 with a HOSTFILE

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
# Without an output folder there is no train.log.
run_stage step1_sft.evaluate /dev/null ${ZERO_CONFIG:+--zero_config "$ZERO_CONFIG"} "$@"

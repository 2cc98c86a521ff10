#!/usr/bin/env bash
# Predict the memory of the three steps per GPU without loading a model; list options that make a step fit
#   bash launch/plan.sh --model_name_or_path DIR_OR_HUB_ID --num_gpus 8        # and options of the steps
set -euo pipefail
ZERO_CONFIG="${ZERO_CONFIG:-}"        # DeepSpeed JSON; empty: zero2
NUM_GPUS=1  # of this process, which runs on the CPU

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
run_alone launch.plan.main ${ZERO_CONFIG:+--zero_config "$ZERO_CONFIG"} "$@"

#!/usr/bin/env bash
# Predict the memory of the three steps per GPU without loading a model; list options that make a step fit
#   bash launch/plan.sh --model_name_or_path DIR_OR_HUB_ID --num_gpus 8        # and options of the steps
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_alone launch.plan.main ${ZERO_CONFIG:+--zero_config "$ZERO_CONFIG"} "$@"

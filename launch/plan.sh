#!/usr/bin/env bash
# Predict memory and time of the three steps without loading a model; list options that make a step fit
#   bash launch/plan.sh --model_name_or_path DIR_OR_HUB_ID --num_gpus 8        # and options of the steps
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_alone launch.plan.main ${ZERO_CONFIG:+--zero_config "$ZERO_CONFIG"} "$@"

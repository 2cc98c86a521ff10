#!/usr/bin/env bash
# A chat in the terminal with a model, or with two that are compared, with scores if there is a reward model
#   bash launch/chat.sh --model_name_or_path OUT3/final [OUT1/final] [--reward_model_name_or_path OUT2/final]
set -euo pipefail
NUM_GPUS=1  # one process, on the first GPU of CUDA_VISIBLE_DEVICES; without one, on all cores

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
run_alone launch.chat.main "$@"

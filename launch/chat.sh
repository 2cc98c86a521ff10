#!/usr/bin/env bash
# Chat in the terminal with one model, or with two side by side; with scores if a reward model is given
#   bash launch/chat.sh --model_name_or_path OUT3/final [OUT1/final] [--reward_model_name_or_path OUT2/final]
set -euo pipefail
NUM_GPUS=1  # one process, on the first GPU of CUDA_VISIBLE_DEVICES; without one, on all cores

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
run_alone launch.chat.main "$@"

#!/usr/bin/env bash
# Chat in the terminal with one model, or with two side by side; with scores if a reward model is given
#   bash launch/chat.sh --model_name_or_path OUT3/final [OUT1/final] [--reward_model_name_or_path OUT2/final]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_alone launch.chat.main "$@"

#!/usr/bin/env bash
# Web page for human feedback: people choose the better of two responses; pairs -> preferences for step 2
#   bash launch/annotate.sh --pair_data pairs.jsonl --output annotations.jsonl   # --agreement: agreement of raters
set -euo pipefail
NUM_GPUS=1  # one process, on the CPU

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
run_alone step2_reward.annotate.main "$@"

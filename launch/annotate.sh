#!/usr/bin/env bash
# A web page on which people say which of two responses is better: pairs -> preferences for step 2
#   bash launch/annotate.sh --pair_data pairs.jsonl --output annotations.jsonl   # --agreement: how raters agree
set -euo pipefail
NUM_GPUS=1  # one process, which computes next to nothing

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
run_alone step2_reward.annotate.main "$@"

#!/usr/bin/env bash
# Web page for human feedback: people choose the better of two responses; pairs -> preferences for step 2
#   bash launch/annotate.sh --pair_data pairs.jsonl --output annotations.jsonl   # --agreement: agreement of raters
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_alone step2_reward.annotate.main "$@"
